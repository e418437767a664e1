"""What needs no process group; two real processes: tests/integration/test_distributed.py. `pytest tests/unit/test_distributed.py`"""

import pytest

from selectmoe import distributed
from selectmoe.errors import UserError
from selectmoe.progress import progress


@pytest.fixture
def process(monkeypatch):
    """A function: be process `rank` of `world`."""

    def be(rank: int, world: int) -> None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))

    return be


@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 9])
def test_every_micro_batch_counts_once(process, n, world, lockstep):
    batches = [f"batch {i}" for i in range(n)]
    shares = []
    for rank in range(world):
        process(rank, world)
        shares.append(distributed.share(batches, lockstep))
    counted = sorted((i, batch) for mine in shares for i, batch, weight in mine if weight == 1)
    assert counted == list(enumerate(batches))
    assert {weight for mine in shares for _, _, weight in mine} <= {0, 1}
    sizes = {len(mine) for mine in shares}
    assert max(sizes) == -(-n // world)
    if lockstep:
        assert len(sizes) == 1, "a sharded layer is computed by all processes or by none"
    else:
        assert all(weight for mine in shares for _, _, weight in mine)


def test_a_process_that_is_alone_shares_nothing(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.share(["a", "b"], lockstep=True) == [(0, "a", 1.0), (1, "b", 1.0)]
    assert distributed.from_first(lambda: 3) == 3
    assert distributed.add_numbers({"loss": 0.5}) == {"loss": 0.5}
    with distributed.together("single"):
        assert distributed.alone()


@pytest.mark.parametrize(
    ("mode", "world", "said"),
    [
        ("single", 2, "torchrun started 2 processes: set training.distributed=ddp"),
        ("ddp", None, "torchrun --nproc-per-node PROCESSES -m selectmoe.cli warmup"),
        ("fsdp", None, "needs torchrun"),
        ("single", 1, None),
        ("single", None, None),
        ("ddp", 1, None),
        ("fsdp", 2, None),
    ],
)
def test_processes_are_started_as_the_configuration_says(process, monkeypatch, mode, world, said):
    if world:
        process(0, world)
    else:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    if said is None:
        distributed.check_launch("warmup", mode)
        return
    with pytest.raises(UserError, match=said):
        distributed.check_launch("warmup", mode)


def test_only_the_first_process_shows_progress(process, monkeypatch, capsys):
    monkeypatch.setattr("selectmoe.progress.INTERVAL", 0.0)
    for rank in (0, 1):
        process(rank, 2)
        assert list(progress(range(2), "training")) == [0, 1]
        assert bool(capsys.readouterr().err) == (rank == 0)
