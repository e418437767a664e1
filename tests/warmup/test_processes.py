"""Warm-up by two processes: every loss against one process, and more ways to go on. `pytest tests/warmup/test_processes.py`

What `tests/integration/test_distributed.py` leaves out: losses other than the recipes' own, and interruptions of LoRA with
dropout, of sharded models, of token budgets with grouped lengths in mixed precision, and of torchrun as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from selectmoe import warmup
from selectmoe.cli import compose
from selectmoe.losses import LOSSES
from selectmoe.manifest import read_manifest
from tests.integration.test_distributed import World, by_step, kill_tree, world

__all__ = ["world"]

OWN = {"observer": "contrastive", "legacy": "sigmoid"}
LOSS_CASES = [(kind, loss) for kind in OWN for loss in LOSSES if loss != OWN[kind]]
DROPOUT = [
    *("training.mode=lora", "training.train_routers=false", "training.lora.dropout=0.2"),
    "training.lora.target_modules=[q_proj,v_proj]",
]
BUDGET = [
    *("training.per_device_batch_size=1", "training.token_budget=256", "training.max_length=64"),
    *("training.group_by_length=true", "training.precision=mixed"),
]
INTERRUPTED: dict[str, tuple[str, list[str]]] = {
    "legacy": ("warmup-legacy-ddp", []),
    "legacy-sharded": ("warmup-legacy-fsdp", []),
    "observer-sharded": ("warmup-observer-fsdp", []),
    "lora": ("warmup-lora-ddp", []),
    "lora-dropout": ("warmup-legacy-ddp", DROPOUT),
    "budget": ("warmup-observer-ddp", BUDGET),
}
"""Name of a folder -> the case, and further words."""


def command(world: World, case: str, folder: str, more: list[str]) -> list[str]:
    """The words of a training; a key that is given twice has its last value."""
    words = world.words(case, folder)
    given = {word.partition("=")[0] for word in more}
    return [word for word in words if word.partition("=")[0] not in given] + more


@pytest.fixture(scope="module")
def made(world: World) -> Path:
    """Every loss in both modes by two processes, and every interruption beside a run without one."""
    killed = command(world, "warmup-legacy-fsdp", "killed", [])
    first = world.torchrun([("hold", 0, 3, killed)])
    assert first.stdout is not None
    assert first.stdout.readline() == "committed\n"
    kill_tree(first)
    assert not (world.root / "killed" / "manifest.json").exists()

    commands = [("go", 0, 1, killed)]
    for kind, loss in LOSS_CASES:
        for mode in ("ddp", "fsdp"):
            more = [f"training.quality_loss_type={loss}", "training.quality_loss_weight=10"]
            folder = f"{kind}-{loss}-{mode}"
            commands.append(("go", 0, 3, command(world, f"warmup-{kind}-{mode}", folder, more)))
    for name, (case, more) in INTERRUPTED.items():
        commands.append(("go", 0, 3, command(world, case, f"{name}-whole", more)))
        words = command(world, case, name, more)
        commands += [("fail", 1, 2, words), ("go", 0, 1, words)]
    _, err = (process := world.torchrun(commands)).communicate(timeout=500)
    assert process.returncode == 0, err
    return world.root


@pytest.fixture(scope="module")
def alone(world: World) -> Callable[[str, str], Path]:
    """The same training by this process alone."""

    def run(kind: str, loss: str) -> Path:
        more = [f"training.quality_loss_type={loss}", "training.quality_loss_weight=10"]
        words = command(world, f"warmup-{kind}-single", f"{kind}-{loss}-single", more)
        return warmup.run(compose("warmup", words[1:]))

    return run


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kind", "loss"), LOSS_CASES)
def test_every_loss_is_the_same_in_two_processes(
    alone: Callable[[str, str], Path], made: Path, kind: str, loss: str
) -> None:
    one = alone(kind, loss)
    for mode in ("ddp", "fsdp"):
        two = made / f"{kind}-{loss}-{mode}"
        assert by_step(two) == pytest.approx(by_step(one), abs=1e-5)
        ours, theirs = (load_file(path / "full_rank_weights.safetensors") for path in (one, two))
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-5


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", INTERRUPTED)
def test_spec7_10_an_interrupted_warm_up_of_two_processes_goes_on_to_the_same_bytes(made: Path, name: str) -> None:
    assert read_manifest(made / name).identity == read_manifest(made / f"{name}-whole").identity
    assert by_step(made / name) == by_step(made / f"{name}-whole")


@pytest.mark.timeout(600)
def test_spec7_10_a_torchrun_killed_as_a_whole_goes_on_to_the_same_bytes(made: Path) -> None:
    assert read_manifest(made / "killed").identity == read_manifest(made / "legacy-sharded-whole").identity
