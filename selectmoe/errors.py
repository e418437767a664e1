"""The exceptions that mean something to the shell (docs/design.md, "Errors"); everything else is exit code 1.

No command runs this module; `selectmoe.cli` turns these into exit codes.
"""

from __future__ import annotations

import os
from pathlib import Path


class UserError(Exception):
    """The user's input is wrong: exit code 2. The message is one line: what, where, what would be right."""


class Refused(Exception):
    """It ran, and the answer is no (a difference found, a gate that does not open): exit code 3."""


class Unavailable(OSError):
    """The world failed, after retries (a server does not answer): exit code 1. The message is one line."""


def unwritable(path: Path, error: OSError) -> Unavailable:
    """What to raise where a file cannot be written: the disk is full, or fails."""
    why = os.strerror(error.errno) if error.errno else str(error)
    return Unavailable(f"{path} cannot be written ({why}): make room, and give the same command again")
