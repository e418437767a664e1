"""Corrupted copies planted into a dataset's own rows, to see whether a judge finds them.

No command runs this module; `ingest plant.share=0.35` does. It is an instrument for experiments: a dataset that is planted
into is held in memory.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from selectmoe.corruption import corrupt
from selectmoe.errors import UserError
from selectmoe.pool import Row, content_hash
from selectmoe.spool import HELD


def held(content: str) -> int:
    """The 64 bits that say on which side of the holdout's threshold a content (its hash in hex) lies."""
    return int.from_bytes(hashlib.sha256(HELD + content.encode()).digest()[:8], "big")


def plant(
    rows: Sequence[Row], share: float, kinds: Sequence[str], seed: str, below: int = 0
) -> tuple[list[Row], list[str]]:
    """Make corrupted copies of rows, kinds in turn, until they are `share` of rows and copies together.

    Args:
        rows: the clean rows of one dataset.
        share: of copies in the result.
        kinds: of corruption.
        seed: of which rows are copied, and how.
        below: no copy may have a content of the holdout, whose salted hash is below this threshold.

    Returns:
        The copies, and the kind of each.

    Raises:
        UserError: the rows do not give so many different copies.
    """
    wanted = round(share * len(rows) / (1 - share))
    rng = random.Random(seed)
    known = {content_hash(row.messages) for row in rows}
    copies: list[Row] = []
    made: list[str] = []
    order: list[Row] = []
    failures = 0
    while len(copies) < wanted:
        if not order:
            order = rng.sample(rows, len(rows))
        row, kind = order.pop(), kinds[len(copies) % len(kinds)]
        copy = corrupt(kind, row, rng.choice(rows), rng)
        content = content_hash(copy.messages) if copy else ""
        if copy is None or content in known or held(content) < below:
            failures += 1
            if failures > 20 * (wanted + len(rows)):
                raise UserError(
                    f"plant.share={share:g} needs {wanted} copies ({kind}) in {row.dataset}; its rows give {len(copies)}"
                )
            continue
        known.add(content)
        copies.append(copy)
        made.append(kind)
    return copies, made
