"""What a dataset holds, in numbers: lengths of its rows, exactly, and the languages of a sample of them.

No command runs this module; `ingest` writes its numbers into `sources.json` and shows the table. Lengths are of whole
rows: characters (code points), bytes (UTF-8), turns (messages). Languages are py3langid's (ISO 639-1, 97 of them; `und`
where it is less sure than `SURE`) of the rows with the smallest content hashes, so that neither the order of the rows nor
chance plays a part; `und` is what code, numbers and a few words alone come out as.
"""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from selectmoe.pool import Message

SAMPLE = 1000
"""Rows of a dataset whose language is asked for."""
TEXT = 2000
"""Characters of a row that the language is told from."""
SURE = 0.5
UNKNOWN = "und"
"""ISO 639's word for a language that nobody knows."""
LENGTHS = ("characters", "bytes", "turns")
QUANTILES = {"min": 0.0, "p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}


class Statistics:
    """The numbers of one dataset, row by row; 12 bytes a row, and the sample."""

    def __init__(self) -> None:
        self._lengths = {name: array("I") for name in LENGTHS}
        self._sample: list[tuple[int, str]] = []

    def add(self, content: bytes, messages: Sequence[Message]) -> None:
        """Take one row, in any order.

        Args:
            content: hash of its content.
            messages: the row.
        """
        self._lengths["characters"].append(sum(len(m["content"]) for m in messages))
        self._lengths["bytes"].append(sum(len(m["content"].encode()) for m in messages))
        self._lengths["turns"].append(len(messages))
        place = -int.from_bytes(content[:16])
        if len(self._sample) < SAMPLE or place > self._sample[0][0]:
            entry = (place, "\n".join(m["content"][:TEXT] for m in messages)[:TEXT])
            (heapq.heappush if len(self._sample) < SAMPLE else heapq.heappushpop)(self._sample, entry)

    def merge(self, other: Statistics) -> None:
        """Take another part's rows."""
        for name, lengths in other._lengths.items():
            self._lengths[name].extend(lengths)
        self._sample = heapq.nlargest(SAMPLE, self._sample + other._sample)
        heapq.heapify(self._sample)

    def result(self) -> dict[str, Any]:
        """As plain data: rows, per length its quantiles, mean and sum, and the languages of the sample.

        Quantiles are lengths that rows have: the smallest that at least that share of the rows does not exceed.
        """
        found = {name: _summary(lengths) for name, lengths in self._lengths.items()}
        languages = Counter(map(language, (text for _, text in self._sample)))
        by_share = sorted(languages.items(), key=lambda pair: (-pair[1], pair[0]))
        return {
            "rows": len(self._lengths["turns"]),
            **found,
            "languages": {"sampled": len(self._sample), "rows": dict(by_share)},
        }


def _summary(lengths: array[int]) -> dict[str, float]:
    import numpy as np

    values = np.sort(np.frombuffer(lengths, np.uint32).astype(np.int64))
    if not len(values):
        return {}
    places = {name: max(0, int(np.ceil(share * len(values))) - 1) for name, share in QUANTILES.items()}
    total = int(values.sum())
    return {n: int(values[at]) for n, at in places.items()} | {"mean": round(total / len(values), 1), "sum": total}


_identifier: Any = None


def language(text: str) -> str:
    """The language of a text (ISO 639-1), or `und`."""
    global _identifier
    if _identifier is None:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        _identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    name, sure = _identifier.classify(text)
    return str(name) if sure >= SURE else UNKNOWN


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A table for people: a line per dataset.

    Args:
        found: name -> what `Statistics.result` gave.
    """
    head = ("dataset", "rows", "characters: median", "p95", "max", "MB", "turns", "languages")
    lines: list[tuple[str, ...]] = [head]
    for name, one in sorted(found.items()):
        languages, sampled = one["languages"]["rows"], one["languages"]["sampled"]
        shares = [f"{code} {n / sampled:.0%}" for code, n in list(languages.items())[:3]]
        rest = [f"{len(languages) - 3} more"] if len(languages) > 3 else []
        characters, turns = one["characters"], one["turns"]
        size = f"{one['bytes'].get('sum', 0) / 1e6:.1f}"
        numbers = (str(characters.get(key, "-")) for key in ("median", "p95", "max"))
        span = f"{turns['min']} to {turns['max']}" if turns else "-"
        lines.append((name, str(one["rows"]), *numbers, size, span, ", ".join(shares + rest)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    last = len(head) - 1
    return "\n".join(
        "  ".join(c.ljust(w) if i in (0, last) else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    )
