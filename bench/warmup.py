"""What a step of warm-up costs: against a full training step, and how much of it is data and logging.

    make bench-warmup            (python -m bench.warmup; some two minutes where nothing else runs)

1. ref-18M, 4,096 tokens, no checkpointing: forward, backward and AdamW's step with gates and routers alone, over the same
   with all parameters (bar: at most 0.72; the arithmetic's floor is 2/3, two of three matrix products). Beside it the
   observer recipe, which has no backward pass through the model (floor: 1/3).
2. Real warm-up of a ref-18M judge on rows of the workload `lengths`, both recipes: seconds in the plan (copies, tokens,
   padding) and in logging, over those of the steps (bar: at most 5 %).

The arms of a ratio take turns in one process, on one thread, in seconds of the processor; the fastest of each counts: other
work on the machine disturbs that least. Ends with exit code 1 where a bar is missed.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.workloads import REF_18M, lengths
from selectmoe import gate_training, ingest, pretrain, warmup
from selectmoe.config import load
from selectmoe.modeling import SelectMoeConfig, SelectMoeForCausalLM
from selectmoe.progress import quiet
from selectmoe.router_weights import router_parameters
from selectmoe.warmup_steps import Plan

TOKENS, ROWS, TURNS = 4096, 4, 5
STEP_BAR, OVERHEAD_BAR = 0.72, 0.05
WORDS = [
    "the",
    "river",
    "runs",
    "past",
    "stone",
    "walls",
    "and",
    "a",
    "copper",
    "lantern",
    "in",
    "winter",
    "while",
    "engines",
]


def model(mode: str) -> SelectMoeForCausalLM:
    """A fresh ref-18M judge."""
    torch.manual_seed(0)
    made: SelectMoeForCausalLM = SelectMoeForCausalLM(SelectMoeConfig(**REF_18M, gate_mode=mode)).train()
    return made


def step(
    made: SelectMoeForCausalLM, trained: list[nn.Parameter], batch: dict[str, Tensor], loss: str
) -> Callable[[], None]:
    """One training step of some parameters."""
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0)

    def run() -> None:
        for parameter in made.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        optimizer.zero_grad()
        if loss == "observer":
            base = made.model(input_ids=batch["input_ids"], output_router_logits=True, use_cache=False)
            value = torch.stack([s.sigmoid().mean() for s in base.quality_score]).mean()
        else:
            value = made(**batch, output_router_logits=True, use_cache=False).loss
        torch.autograd.backward(value)
        optimizer.step()

    return run


def step_ratios() -> dict[str, float]:
    """Seconds of the fastest step, by what is trained."""
    torch.manual_seed(1)
    ids = torch.randint(3, REF_18M["vocab_size"], (ROWS, TOKENS // ROWS))
    batch = {"input_ids": ids, "labels": ids}
    applied, observer = model("applied"), model("observer")
    gates = [p for name, p in router_parameters(observer).items() if "quality_gate" in name]
    arms = {
        "all parameters": step(applied, list(applied.parameters()), batch, "full"),
        "gates and routers": step(applied, list(router_parameters(applied).values()), batch, "full"),
        "observers' gates": step(observer, gates, batch, "observer"),
    }
    best = dict.fromkeys(arms, float("inf"))
    for _ in range(TURNS):
        for name, run in arms.items():
            started = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - started)
    return best


def rows_and_tokenizer(root: Path) -> tuple[str, str]:
    """The paths of a pool of the workload `lengths`, and of a checkpoint that has a tokenizer for it."""
    with open(root / "rows.jsonl", "w", encoding="utf-8") as file:
        for n, tokens in enumerate(lengths(32)):
            words = [WORDS[(n * 7 + k * (n % 5 + 1)) % len(WORDS)] for k in range(tokens)]
            cut = max(1, len(words) // 4)
            roles = {"user": " ".join(words[:cut]), "assistant": " ".join([*words[cut:], f"number {n}"])}
            messages = [{"role": role, "content": text} for role, text in roles.items()]
            file.write(json.dumps({"messages": messages}) + "\n")
    pool = ingest.run(
        load(ingest.IngestConfig, {"holdout": 0}, data=str(root / "rows.jsonl"), output_dir=str(root / "pool"))
    )
    sizes = {"hidden_size": 8, "intermediate_size": 8, "steps": 1, "vocab_size": 400}
    small = pretrain.run(load(pretrain.PretrainConfig, sizes, data=str(pool), output_dir=str(root / "tokenizer")))
    return str(pool), str(small)


def overhead(recipe: str, pool: str, tokenizer: str, root: Path) -> dict[str, float]:
    """Seconds of a real warm-up: in all steps, in data, in logging."""
    from transformers import AutoTokenizer

    place = root / f"judge-{recipe}"
    model({"observer": "observer", "legacy": "applied"}[recipe]).save_pretrained(place)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(place)
    spent = {"step": 0.0, "data": 0.0, "logging": 0.0}
    timed: list[tuple[Any, str, str]] = [
        (gate_training.GateTraining, "_step", "step"),
        (gate_training.GateTraining, "_note", "logging"),
    ]
    timed += [(Plan, "step", "data"), (Plan, "tensors", "data")]
    originals = {(owner, name): getattr(owner, name) for owner, name, _ in timed}

    def clocked(function: Any, key: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[key] += time.process_time() - started

        return run

    for owner, name, key in timed:
        setattr(owner, name, clocked(originals[owner, name], key))
    training = {"epochs": 1, "batch_size": 16, "per_device_batch_size": 4, "max_length": 256}
    given = {"selector_model.path": str(place), "data": pool, "output_dir": str(root / recipe), "threads": 1}
    try:
        warmup.run(load(warmup.WarmupConfig, {"recipe": recipe, "training": training}, **given))
    finally:
        for (owner, name), function in originals.items():
            setattr(owner, name, function)
    return spent


def main() -> int:
    """Measure and print; 1 where a bar is missed."""
    quiet()
    missed = 0
    torch.set_num_threads(1)
    print(f"one thread, torch {torch.__version__}; ref-18M, {TOKENS} tokens, fastest of {TURNS}")
    seconds = step_ratios()
    whole = seconds["all parameters"]
    for name, value in seconds.items():
        bar = STEP_BAR if name == "gates and routers" else None
        told = f"  bar {bar}" if bar else ""
        print(f"  {name:<20} {value:7.3f} s   {value / whole:5.2f} of a full step{told}")
        missed += bar is not None and value / whole > bar
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pool, tokenizer = rows_and_tokenizer(root)
        for recipe in ("observer", "legacy"):
            spent = overhead(recipe, pool, tokenizer, root)
            total = spent["step"] + spent["logging"]  # a step's data are inside of it
            share = (spent["data"] + spent["logging"]) / total
            print(
                f"  {recipe:<20} {total:7.3f} s   data {spent['data'] / total:.2%}, logging {spent['logging'] / total:.2%}"
                f" of the steps  bar {OVERHEAD_BAR:.0%}"
            )
            missed += share > OVERHEAD_BAR
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
