"""What a step of warm-up costs: against a full training step, and how much of it is data and logging.

    make bench-warmup            (python -m bench.warmup; some four minutes where nothing else runs)

1. ref-18M, 4,096 tokens, no checkpointing: forward, backward and AdamW's step with gates and routers alone, over the same
   with all parameters (bar: at most 0.72; the arithmetic's floor is 2/3, two of three matrix products). Beside it the
   observer recipe, which has no backward pass through the model (floor: 1/3). And the optimizer's state in numbers.
2. Real warm-up of a ref-18M judge on 192 rows of the workload `lengths`, two epochs of 12 steps, both recipes, its numbers
   sent to a real MLflow as they come: seconds of tokenising, in the plan (copies, padding), in logging, and of the thread that
   sends, over those of the steps (bar: at most 5 % together). Importing mlflow, once and beside the work, is not counted.

The arms of a ratio take turns in one process, on one thread, in seconds of the processor; printed are the median over the
turns of the ratio to the full step of the same turn, and its quartiles. Ends with exit code 1 where a bar is missed.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.judges import tokenizer_of, word_pool
from bench.tracking import mlflow_server
from bench.workloads import REF_18M
from selectmoe import gate_training, sending, warmup
from selectmoe.config import load
from selectmoe.modeling import SelectMoeConfig, SelectMoeForCausalLM
from selectmoe.progress import quiet
from selectmoe.router_weights import router_parameters
from selectmoe.warmup_steps import Plan

TOKENS, ROWS, TURNS = 4096, 4, 12
POOL_ROWS, EPOCHS, BATCH = 192, 2, 16
STEP_BAR, OVERHEAD_BAR = 0.72, 0.05


def model(mode: str) -> SelectMoeForCausalLM:
    """A fresh ref-18M judge."""
    torch.manual_seed(0)
    made: SelectMoeForCausalLM = SelectMoeForCausalLM(SelectMoeConfig(**REF_18M, gate_mode=mode)).train()
    return made


def step(
    made: SelectMoeForCausalLM, trained: list[nn.Parameter], batch: dict[str, Tensor], loss: str
) -> tuple[Callable[[], None], torch.optim.AdamW]:
    """One training step of some parameters, and their optimizer."""
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

    return run, optimizer


def step_seconds() -> dict[str, tuple[list[float], int]]:
    """By what is trained: seconds of its step in every turn, and how many numbers its optimizer keeps."""
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
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(-1, TURNS):  # one to warm up
        for name, (run, _) in arms.items():
            started = time.process_time()
            run()
            if turn >= 0:
                seconds[name].append(time.process_time() - started)
    return {name: (seconds[name], kept(optimizer)) for name, (_, optimizer) in arms.items()}


def kept(optimizer: torch.optim.AdamW) -> int:
    """Numbers in an optimizer's state, its step counters apart."""
    return sum(t.numel() for state in optimizer.state.values() for key, t in state.items() if key != "step")


def overhead(recipe: str, pool: str, tokenizer: str, root: Path) -> dict[str, float]:
    """Seconds of a real warm-up: in tokenising, in all steps, in data, in logging, and of the thread that sends."""
    from transformers import AutoTokenizer

    place = root / f"judge-{recipe}"
    model({"observer": "observer", "legacy": "applied"}[recipe]).save_pretrained(place)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(place)
    spent = {"tokenising": 0.0, "step": 0.0, "data": 0.0, "logging": 0.0, "sending": 0.0}
    timed: list[tuple[Any, str, str]] = [
        (gate_training.GateTraining, "_step", "step"),
        (gate_training.GateTraining, "_note", "logging"),
    ]
    timed += [(Plan, "step", "data"), (Plan, "tensors", "data"), (Plan, "__init__", "tokenising")]
    timed += [(gate_training.GateTraining, "train", "sending")]
    originals = {(owner, name): getattr(owner, name) for owner, name, _ in timed}

    def clocked(function: Any, key: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            started, whole = time.thread_time(), time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                own = time.thread_time() - started
                spent[key] += time.process_time() - whole - own if key == "sending" else own

        return run

    for owner, name, key in timed:
        setattr(owner, name, clocked(originals[owner, name], key))
    training = {"epochs": EPOCHS, "batch_size": BATCH, "per_device_batch_size": 4, "max_length": 256}
    given = {"selector_model.path": str(place), "data": pool, "output_dir": str(root / recipe), "threads": 1}
    given["work_root"] = str(root / f"work-{recipe}")
    try:
        with sending.sending(str(given["work_root"])):
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
    print(
        f"one thread, torch {torch.__version__}; ref-18M, {TOKENS} tokens, {TURNS} turns; load {os.getloadavg()[0]:.1f}"
    )
    found = step_seconds()
    whole, _ = found["all parameters"]
    for name, (seconds, numbers) in found.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(seconds, whole, strict=True)], n=4)
        bar = STEP_BAR if name == "gates and routers" else None
        told = f"  bar {bar}" if bar else ""
        print(
            f"  {name:<20} {statistics.median(seconds):7.3f} s   {middle:5.3f} of a full step ({low:.3f} {high:.3f}), "
            f"{numbers:,} numbers of state{told}"
        )
        missed += bar is not None and middle > bar
    with tempfile.TemporaryDirectory() as folder, mlflow_server(Path(folder)) as uri:
        import mlflow  # noqa: F401  # once, and not while anything is timed

        os.environ["MLFLOW_TRACKING_URI"] = uri
        root = Path(folder)
        pool = word_pool(root / "pool", POOL_ROWS)
        tokenizer = tokenizer_of(root / "tokenizer", pool)
        for recipe in ("observer", "legacy"):
            spent = overhead(recipe, str(pool), str(tokenizer), root)
            total = spent["tokenising"] + spent["step"] + spent["logging"]  # a step's data are inside of it
            shares = {name: spent[name] / total for name in ("tokenising", "data", "logging", "sending")}
            said = ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
            share = sum(shares.values())
            print(f"  {recipe:<20} {total:7.3f} s   {said}; together {share:.2%}  bar {OVERHEAD_BAR:.0%}")
            missed += share > OVERHEAD_BAR
    return 1 if missed else 0


if __name__ == "__main__":
    os.environ |= {"TOKENIZERS_PARALLELISM": "false"}  # what other threads do would not be seen
    sys.exit(main())
