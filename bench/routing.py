"""Routing against a plain loop over transformers' OLMoE, and what routing costs beside the model. `make bench-routing`.

    python -m bench.routing [rows=400] [rounds=3] [model=18M|117M]

1. The loop: `output_router_logits=True`, padded batches of 32 rows in file order, pooled per row. Ours: `selectmoe route`'s
   own code, plan and all. Same weights, same rows (workload `lengths`), same threads, in turn. Bar: at least 0.85 x (tokens
   that the loop computes / tokens that ours computes) times its rows per second; the same router probabilities to 1e-5.
2. Of the stage's time after the judge is loaded, the share that is not the model's forward pass (bar: at most 5 %).
3. Tokenising as `route` does against the tokenizer library's own batch call on the same segments (bar: at least 0.8).

Seconds of the processor on one thread, since they hold on a busy machine too; the fastest round of each counts.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.judges import judge_of, tokenizer_of, word_pool
from bench.workloads import REF_18M, REF_117M
from selectmoe import families, route
from selectmoe import judge as judging
from selectmoe.config import load
from selectmoe.pool import read_pool
from selectmoe.progress import quiet
from selectmoe.router_data import read_router_data

BATCH = 32
SPEED_BAR, OVERHEAD_BAR, TOKENS_BAR = 0.85, 0.05, 0.8


def loop(model: Any, rows: list[list[int]]) -> tuple[dict[int, np.ndarray], int]:
    """What one would write by hand; router probabilities [L, E] by row, and the tokens that were computed."""
    import torch

    found: dict[int, np.ndarray] = {}
    computed = 0
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        length = max(map(len, part))
        ids = torch.ones((len(part), length), dtype=torch.long)
        mask = torch.zeros((len(part), length), dtype=torch.long)
        for at, row in enumerate(part):
            ids[at, : len(row)] = torch.tensor(row)
            mask[at, : len(row)] = 1
        with torch.inference_mode():
            out = model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False)
            probs = torch.stack([p.softmax(-1).reshape(len(part), length, -1) for p in out.router_logits], 1)
            means = (probs * mask[:, None, :, None]).sum(2) / mask.sum(1)[:, None, None]
        found |= {start + at: mean.numpy() for at, mean in enumerate(means)}
        computed += ids.numel()
    return found, computed


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of a call, and what it gave."""
    began = time.process_time()
    found = work()
    return time.process_time() - began, found


class Forward:
    """Processor seconds spent inside the judge's forward passes, by the thread that computes."""

    def __init__(self) -> None:
        """Time `Judge.read` from now on."""
        self.seconds, self._real = 0.0, judging.Judge.read
        judging.Judge.read = self._timed()  # type: ignore[method-assign]

    def _timed(self) -> Any:
        def read(judge: Any, batch: Any) -> Any:
            began = time.thread_time()
            found = self._real(judge, batch)
            self.seconds += time.thread_time() - began
            return found

        return read

    def close(self) -> None:
        """Leave `Judge.read` as it was."""
        judging.Judge.read = self._real  # type: ignore[method-assign]


def main(rows: int = 400, rounds: int = 3, model: str = "18M") -> int:
    """Measure and print; 1 where a bar is missed."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    quiet()
    torch.set_num_threads(1)
    sizes = {"18M": REF_18M, "117M": REF_117M}[model]
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        pool = word_pool(root / "pool", rows)
        path = judge_of(root / "judge", tokenizer_of(root / "tokenizer", pool), sizes)
        values = {"selector_model": {"path": str(path)}, "data": str(pool), "threads": 1}
        config = load(route.RouteConfig, values, output_dir=str(root / "out"))
        judge = judging.Judge.load(config)
        ours = families.load(str(path), torch.device("cpu")).model
        theirs = OlmoeForCausalLM(OlmoeConfig(**sizes)).eval()
        theirs.load_state_dict(ours.state_dict(), strict=False)
        texts = read_pool(pool / "pool")
        from selectmoe.template import encode_many

        encoded = [e.input_ids for e in encode_many(texts, judge.tokenizer, 1024)]
        best: dict[str, float] = {"loop": 9e9, "ours": 9e9}
        share = 1.0
        for n in range(rounds):
            spent, (expected, padded) = seconds(lambda: loop(theirs, encoded))
            best["loop"] = min(best["loop"], spent)
            forward = Forward()
            out = root / f"out-{n}"
            ours_now = load(route.RouteConfig, values, output_dir=str(out))
            spent, _ = seconds(partial(staged, judge, ours_now))
            forward.close()
            best["ours"] = min(best["ours"], spent)
            share = min(share, 1 - forward.seconds / spent)
        data = read_router_data(out)
        computed = int(np.sum([u["padded_tokens"] for u in units_of(out)]))
        furthest = max(float(np.abs(data.router_probs[i] - expected[i]).max()) for i in range(rows))
    bar = SPEED_BAR * padded / computed
    speed = best["loop"] / best["ours"]
    print(f"{rows} rows of {model}; tokens computed: loop {padded}, ours {computed} ({padded / computed:.2f} x)")
    print(f"rows per second, ours over the loop's: {speed:.2f} (bar {bar:.2f}); {rows / best['ours']:.1f} rows/s")
    print(f"router probabilities differ by {furthest:.1e} at most (bar 1e-5)")
    print(f"share of the stage that is not the model's forward: {100 * share:.1f} % (bar 5 %)")
    tokenising = tokens_ratio(judge.tokenizer, texts)
    print(f"tokenising, ours over the library's batch call: {tokenising:.2f} x its speed (bar {TOKENS_BAR})")
    met = speed >= bar and furthest <= 1e-5 and share <= OVERHEAD_BAR and tokenising >= TOKENS_BAR
    return int(not met)


def staged(judge: Any, config: Any) -> None:
    """`selectmoe route` with a judge that is loaded already, torch's and Python's start left out."""
    real = judging.Judge.load
    judging.Judge.load = lambda config: judge  # type: ignore[method-assign]
    try:
        route.run(config)
    finally:
        judging.Judge.load = real  # type: ignore[method-assign]


def units_of(out: Path) -> list[dict[str, Any]]:
    """The lines of `units.jsonl`."""
    import json

    return [json.loads(line) for line in (out / route.UNITS).read_text().splitlines()]


def tokens_ratio(tokenizer: Any, rows: list[Any], rounds: int = 7) -> float:
    """How fast our plain tokenising is, as a ratio to the library's own batch call on the same segments."""
    from selectmoe.template import TAGS, encode_segments

    segments = [text for row in rows for m in row.messages for text in (TAGS[m["role"]], m["content"], "\n")]
    backend = tokenizer.backend_tokenizer
    theirs, ours = [], []
    for _ in range(rounds):
        theirs.append(seconds(lambda: backend.encode_batch_fast(segments, add_special_tokens=False))[0])
        ours.append(seconds(lambda: encode_segments((r.messages for r in rows), tokenizer, 1024))[0])
    return min(theirs) / min(ours)


if __name__ == "__main__":
    words = dict(word.split("=", 1) for word in sys.argv[1:])
    sys.exit(main(**{k: v if k == "model" else int(v) for k, v in words.items()}))  # type: ignore[arg-type]
