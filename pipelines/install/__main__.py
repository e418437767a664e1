"""The chart's own commands, run by its Jobs, init containers, CronJob and tests.

    python -m pipelines.install secrets spec=/etc/select-moe/secrets.yaml
    python -m pipelines.install prove what=s3 bucket=select-moe
    python -m pipelines.install COMMAND --help

Every command can be repeated, run twice at the same time and killed at any instant: what is there already is left as it
is. A server that is not up yet is asked again until `wait=` seconds have passed. Passwords come from the environment
only and are never printed.
"""

import importlib
import sys
from collections.abc import Sequence

from pipelines.install.options import read, usage
from selectmoe import entry
from selectmoe.errors import UserError

COMMANDS = {
    "secrets": "create the Secrets that are missing, with random passwords",
    "bucket": "create the bucket where it is missing",
    "database": "bring MLflow's database to the schema of this image",
    "upload": "register the pipeline, compiled for this site, under its digest",
    "run": "register the pipeline and start it, once per name",
    "retention": "delete MLflow's old runs for good, their artifacts too",
    "prove": "prove that a part of the installation works",
}


def command(arguments: Sequence[str]) -> int:
    """Do what the command line says.

    Args:
        arguments: the command and its `key=value` words.

    Returns:
        The exit code.

    Raises:
        UserError: the words are not understood, or what the command does meets a mistake of the user.
        Refused: the answer of `prove` is no.
        Unavailable: a server does not answer.
    """
    name, words = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in ("--help", "-h"):
        print("\n".join(["usage: python -m pipelines.install COMMAND key=value ...", "", *_listed()]))
        return 0
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; there are: {', '.join(COMMANDS)}")
    module = importlib.import_module(f"pipelines.install.{name}")
    if {"--help", "-h"} & {*words}:
        print(usage(name, COMMANDS[name], module.Options))
        return 0
    module.run(read(module.Options, words))
    return 0


def _listed() -> list[str]:
    return [f"  {name:<10} {what}" for name, what in COMMANDS.items()]


def main(arguments: Sequence[str]) -> int:
    """The command line.

    Returns:
        0 done, 1 a server is away or the fault is ours, 2 the user's input, 3 the answer is no.
    """
    name = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    return entry.enter(f"install {name}".strip(), lambda: command(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
