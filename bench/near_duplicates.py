"""What the search for near-duplicates finds among real rows with planted copies, and at which speed. `make bench-near-duplicates`.

    python -m bench.near_duplicates [rows=6000] [threshold=0.8]

Rows: docstrings of installed packages as answers, which hold near-duplicates of their own. Half of them get a copy, spoiled in one of seven ways: five that a
person would call a near-duplicate, two that are none. Shown per n-gram size: the share of each kind that goes; of the
pairs whose similarity reaches the threshold (computed exactly), the share that was found; rows per second, one thread.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from selectmoe.near_duplicates import NearDuplicates, NearDuplicatesConfig, bands_of, sketch
from selectmoe.pool import Message, content_hash

Spoil = Callable[[str, str, random.Random], str]


def _replaced(share: float) -> Spoil:
    def spoil(answer: str, other: str, rng: random.Random) -> str:
        words, new = answer.split(), other.split()
        for at in rng.sample(range(len(words)), max(1, round(share * len(words)))):
            words[at] = rng.choice(new)
        return " ".join(words)

    return spoil


PACKAGES = ("numpy", "scipy", "sklearn", "pandas")
KINDS: dict[str, Spoil] = {
    "case and marks": lambda answer, other, rng: answer.upper().replace(",", " -") + "!",
    "one word": _replaced(0.0),
    "3 % of words": _replaced(0.03),
    "8 words more": lambda answer, other, rng: f"{answer} {' '.join(other.split()[:8])}",
    "cut by 10 %": lambda answer, other, rng: answer[: int(0.9 * len(answer))],
    "not: 30 % of words": _replaced(0.3),
    "not: half of another's": lambda answer, other, rng: f"{answer[: len(answer) // 2]} {other[len(other) // 2 :]}",
}


def _docstrings(package: str) -> list[tuple[str, str]]:
    """(qualified name, docstring) of every function and class of an installed package, of 20 to 400 words."""
    folder = Path(importlib.util.find_spec(package).submodule_search_locations[0])  # type: ignore[union-attr,index]
    out = []
    for path in sorted(folder.rglob("*.py")):
        module = path.relative_to(folder.parent).with_suffix("").as_posix().replace("/", ".")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef | ast.ClassDef) else None
            if text and 20 <= len(text.split()) <= 400:
                out.append((f"{module}.{node.name}", text))  # type: ignore[attr-defined]
    return out


def _rows(count: int) -> list[list[Message]]:
    chosen = [pair for package in PACKAGES for pair in _docstrings(package)]
    random.Random(0).shuffle(chosen)
    rows = [
        [{"role": "user", "content": f"What does {name} do?"}, {"role": "assistant", "content": text}]
        for name, text in chosen
    ]
    return rows[:count]


def main(rows: int = 6000, threshold: float = 0.8) -> int:
    """Measure and print."""
    originals = _rows(rows)
    rng = random.Random(1)
    kinds = list(KINDS)
    copies = []
    for n, row in enumerate(originals[: len(originals) // 2]):
        other = rng.choice(originals)[1]["content"]
        answer = KINDS[kinds[n % len(kinds)]](row[1]["content"], other, rng)
        copies.append([row[0], {"role": "assistant", "content": answer}])
    everything = originals + copies
    size = sum(len(m["content"]) for row in everything for m in row) / len(everything)
    bands, width = bands_of(threshold)
    print(f"{len(originals)} rows and {len(copies)} copies, {size:.0f} characters a row, threshold {threshold}")
    print(f"{bands} bands of {width} values")
    for ngram in (1, 2, 3, 5):
        _one(originals, copies, NearDuplicatesConfig(threshold, ngram))
    return 0


def _one(originals: list[list[Message]], copies: list[list[Message]], config: NearDuplicatesConfig) -> None:
    everything, kinds = originals + copies, list(KINDS)
    started = time.process_time()
    sketches = [sketch(row, config) for row in everything]
    sketched = time.process_time() - started
    with tempfile.TemporaryDirectory() as folder:
        search = NearDuplicates(config, Path(folder))
        for n, row in enumerate(everything):
            search.add(n, bytes.fromhex(content_hash(row)), sketches[n])
        started = time.process_time()
        found = search.find()
        seconds = time.process_time() - started
    gone = {near.row: near.kept for near in found}
    start = 8 * bands_of(config.threshold)[0]
    grams = [{s[i : i + 4] for i in range(start, len(s), 4)} for s in sketches]
    reached = hit = 0
    share: dict[str, list[bool]] = {kind: [] for kind in kinds}
    for n in range(len(copies)):
        a, b = n, len(originals) + n
        went = a in gone or b in gone
        if len(grams[a] & grams[b]) >= config.threshold * len(grams[a] | grams[b]):
            reached += 1
            hit += went
        share[kinds[n % len(kinds)]].append(went)
    alone = sum(n in gone for n in range(len(copies), len(originals)))
    by_kind = ", ".join(f"{kind} {sum(v) / len(v):.0%}" for kind, v in share.items())
    print(f"n = {config.ngram}: {by_kind}; rows without a copy {alone / (len(originals) - len(copies)):.1%}")
    rates = f"{len(everything) / sketched:.0f} rows/s sketched, {len(everything) / seconds:.0f} rows/s compared"
    print(f"       pairs at the threshold found: {hit}/{reached} ({hit / max(1, reached):.2%}); {rates}")


if __name__ == "__main__":
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    sys.exit(main(int(given.get("rows", 6000)), float(given.get("threshold", 0.8))))
