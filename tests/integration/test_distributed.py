"""`warmup` and `finetune` by two processes under torchrun, against one process: `pytest tests/integration/test_distributed.py`.

Starting takes longer than training here: one launch of torchrun trains everything in turn; another one, before it, is killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from selectmoe import finetune, pool, warmup
from selectmoe.cli import compose
from selectmoe.manifest import read_manifest
from selectmoe.selection import FILE, Selected, write_selected

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = """
import json, sys, time
from selectmoe import cli, distributed, finetuning, gate_training

saved, stepped = finetuning.Trainer.save, gate_training.GateTraining._step
committed = gate_training.GateTraining._commit
added, sharded = distributed.add_gradients, distributed.shard
steps, shares = [], []

def hold(*args):
    saved(*args)
    print("committed", flush=True)
    time.sleep(600)

def hold_gates(self, step):
    committed(self, step)
    if step == 2:
        print("committed", flush=True)
        time.sleep(600)

def fail(self, step):
    if step == 2:
        raise RuntimeError("interrupted by the test")
    return stepped(self, step)

def count(parameters):
    steps.append(1)
    added(parameters)

def shard(called, layers, whole):
    sharded(called, layers, whole)
    parameters = list(called.parameters())
    here = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in parameters)
    shares.append(here / sum(p.numel() for p in parameters))

gate_training.COMMIT_SECONDS = finetuning.SAVE_SECONDS = -1.0
distributed.add_gradients, distributed.shard = count, shard
for mode, code, made, words in json.loads(sys.argv[1]):
    finetuning.Trainer.save = hold if mode == "hold" else saved
    gate_training.GateTraining._commit = hold_gates if mode == "hold" else committed
    gate_training.GateTraining._step = fail if mode == "fail" else stepped
    steps.clear()
    shares.clear()
    found = [cli.main(words), len(steps)]
    if found != [code, made] or bool(shares) != ("training.distributed=fsdp" in words) or any(s > 0.6 for s in shares):
        sys.exit(f"process {distributed.rank()}: {words[:2]}: exit code and steps {found}, not {[code, made]}; shards {shares}")
"""
"""Commands in turn, with the exit code and the number of steps that each process is to have; every step is committed.

hold: stop when fine-tuning, or warm-up after two steps, has committed a state. fail: break off in the third step of warm-up.
"""

COMMON = {"training.epochs": 1, "training.batch_size": 6, "training.per_device_batch_size": 2}
"""Fourteen rows in steps of three, three and one micro-batches: in the last step one process has none."""
WARMUP = {"training.rows": 14, "training.learning_rate": 1e-2}
FINETUNE = {"training.lora_r": 4, "training.lora_alpha": 8, "training.learning_rate": 1e-2}

KINDS = ("warmup-observer", "warmup-legacy", "warmup-lora", "finetune-lora")
CASES = [f"{kind}-{mode}" for kind in KINDS for mode in ("ddp", "fsdp")]
RANKED = [
    "training.lora.target_modules=[q_proj]",
    "training.gradient_checkpointing=true",
    "training.enable_load_balancing=true",
    "training.mode=lora",
]


@dataclass(frozen=True)
class World:
    root: Path
    judges: dict[str, str]
    pool: str
    target: str
    rows: str

    def words(self, case: str, folder: str, *more: str) -> list[str]:
        """The command of one training, with further words."""
        stage, kind, mode = case.split("-")
        keys: dict[str, Any] = {"output_dir": self.root / folder, "training.distributed": mode, **COMMON}
        if stage == "warmup":
            recipe = "observer" if kind == "observer" else "legacy"
            keys |= {"recipe": recipe, "data": self.pool, "selector_model.path": self.judges[recipe], **WARMUP}
            keys |= {"holdout": self.pool, "training.eval_rows": 3}
        else:
            keys |= {"training.model": self.target, "dataset.data_path": self.rows, **FINETUNE}
        ranked = RANKED if (stage, kind) == ("warmup", "lora") else []
        return [stage, *(f"{key}={value}" for key, value in keys.items()), *ranked, *more]

    def torchrun(self, commands: list[tuple[str, int, int, list[str]]]) -> subprocess.Popen[str]:
        program = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")} | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [*launch, *program], env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )


@pytest.fixture(scope="module")
def world(small_pool: Path, small_olmoe: Path, small_judge: Callable[..., str], tmp_path_factory: Any) -> World:
    root = tmp_path_factory.mktemp("world")
    (root / "rows").mkdir()
    chosen = pool.read_pool(pool.locate(small_pool))[:14]
    write_selected(root / "rows" / FILE, [Selected(row, {}, None, None) for row in chosen])
    judges = {"observer": small_judge("observer"), "legacy": small_judge("applied", trash_expert_mode="noise")}
    return World(root, judges, str(small_pool), str(small_olmoe), str(root / "rows"))


def kill_tree(process: subprocess.Popen[str]) -> None:
    """kill -9 for torchrun and all that it started (its processes have sessions of their own)."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def two(world: World) -> Path:
    """What two processes made: every case, `failed` and `killed` (which went on after that)."""
    killed = world.words("finetune-lora-ddp", "killed")
    first = world.torchrun([("hold", 0, 3, killed)])
    assert first.stdout is not None
    assert first.stdout.readline() == "committed\n"
    kill_tree(first)
    assert not (world.root / "killed" / "manifest.json").exists()

    failed = world.words("warmup-observer-ddp", "failed")
    taken = world.words("warmup-legacy-ddp", "failed")
    commands = [("go", 0, 2, killed), ("fail", 1, 2, failed), ("go", 0, 1, failed), ("go", 0, 0, failed)]
    commands += [("go", 2, 0, taken), *(("go", 0, 3, world.words(case, case)) for case in CASES)]
    out, err = (second := world.torchrun(commands)).communicate(timeout=250)
    assert second.returncode == 0, err
    assert err.count("holds another run's output") == 2, "found by the first process, said by both"
    made = ["killed", "failed", "failed", *CASES]
    assert out.split() == [str(world.root / folder) for folder in made], "the first process alone says where it is"
    return world.root


@pytest.fixture(scope="module")
def one(world: World) -> Callable[[str], Path]:
    """The same training by this process alone."""

    def run(case: str) -> Path:
        stage, kind, _ = case.split("-")
        words = world.words(f"{stage}-{kind}-single", f"{stage}-{kind}-single")
        return {"warmup": warmup, "finetune": finetune}[stage].run(compose(stage, words[1:]))

    return run


def by_step(output: Path) -> dict[tuple[str, int], float]:
    entries = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {(entry["name"], entry["step"]): entry["value"] for entry in entries if "step" in entry}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_losses_and_weights_of_one(one: Callable[[str], Path], two: Path, case: str) -> None:
    alone, together = one(case), two / case
    expected, found = by_step(alone), by_step(together)
    assert {step for _, step in expected} in ({0, 1, 2, 3}, {1, 2, 3})
    assert found == pytest.approx(expected, abs=1e-5)
    weights = "adapter_model.safetensors" if "-lora-" in case else "full_rank_weights.safetensors"
    ours, theirs = load_file(alone / weights), load_file(together / weights)
    assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in theirs.items()}
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5
    manifest = read_manifest(together)
    assert manifest.environment["processes"] == 2
    assert {file["path"] for file in manifest.files} == {file["path"] for file in read_manifest(alone).files}
    assert not (together / ".work").exists()


def test_sharding_changes_no_byte_of_the_result(two: Path) -> None:
    for ddp, fsdp in zip(CASES[::2], CASES[1::2], strict=True):
        assert read_manifest(two / ddp).identity == read_manifest(two / fsdp).identity


@pytest.mark.parametrize(("folder", "case"), [("killed", "finetune-lora-ddp"), ("failed", "warmup-observer-ddp")])
def test_what_was_interrupted_goes_on_to_the_same_bytes(two: Path, folder: str, case: str) -> None:
    assert read_manifest(two / folder).identity == read_manifest(two / case).identity
    assert by_step(two / folder) == by_step(two / case)
