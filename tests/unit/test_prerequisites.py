"""What a pool, a batch and a checkpoint must give; the whole of `check` is in tests/integration/test_check.py.

pytest tests/unit/test_prerequisites.py
"""

import json
import struct

import pytest

from selectmoe import prerequisites
from selectmoe.cli import compose
from selectmoe.errors import Unavailable, UserError
from selectmoe.estimate import Pool


def config(**words):
    given = {"data": "rows.jsonl", "source_model": "judge", "output_dir": "out", "ingest.holdout": "20"} | words
    return compose("run", [f"{key}={value}" for key, value in given.items()])


POOL = Pool(rows=120, text=40_000, answers=20_000, held=20)


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        ({"budget": "10"}, 10),
        ({"budget": "0.1"}, 10),
        ({"budget": "70"}, 70),
        ({"budget": "500t"}, 12),
        ({"budget": "80", "select.picking": "legacy"}, 80),
        ({"budget": "140", "ingest.plant.share": "0.5"}, 140),
    ],
)
def test_rows_that_a_budget_selects(words, rows):
    given = config(**{"finetune.training.batch_size": "8", **words})
    assert prerequisites.check_rows(given, POOL.rows, POOL.answers) == rows


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ({"budget": "71"}, "leaves 70"),
        ({"budget": "0.8"}, "is 80 rows"),
        ({"budget": "101", "select.picking": "legacy"}, "the pool has 100"),
        ({"budget": "30000t"}, "20000 bytes"),
        ({"budget": "10", "finetune.training.batch_size": "11"}, "lower it to 10"),
        ({"budget": "10", "warmup.training.rows": "101"}, "100 rows"),
    ],
)
def test_what_a_pool_cannot_give(words, named):
    with pytest.raises(UserError, match=named):
        prerequisites.check_rows(config(**{"finetune.training.batch_size": "8", **words}), POOL.rows, POOL.answers)


def test_rows_that_are_not_made_yet_are_believed():
    given = config(budget="900000t", **{"finetune.training.batch_size": "8"})
    assert prerequisites.check_rows(given, POOL.rows) == 70


def test_only_a_server_that_is_silent_is_the_worlds_fault():
    def fail(error):
        raise error

    proofs = prerequisites.Proofs()
    proofs.attempt(fail, Unavailable("no answer"))
    with pytest.raises(Unavailable, match=r"^no answer$"):
        proofs.settle()
    proofs.attempt(fail, UserError("a is wrong"))
    with pytest.raises(UserError, match=r"^2 mistakes"):
        proofs.settle()


def test_one_mistake_is_said_as_it_is_and_several_with_numbers():
    def fail(text):
        raise UserError(text)

    proofs = prerequisites.Proofs()
    assert proofs.attempt(lambda: 3) == 3
    proofs.settle()
    proofs.attempt(fail, "a is wrong")
    proofs.attempt(fail, "a is wrong")
    with pytest.raises(UserError, match=r"^a is wrong$"):
        proofs.settle()
    proofs.attempt(fail, "b is wrong")
    with pytest.raises(UserError, match=r"^2 mistakes: \(1\) a is wrong \(2\) b is wrong$"):
        proofs.settle()


@pytest.mark.parametrize(
    "content",
    [b"", b"1234", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 4) + b"nope"],
)
def test_a_file_that_is_no_safetensors(content, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"w\.safetensors is not a safetensors file"):
        prerequisites.count_parameters(tmp_path / "w.safetensors")


def test_parameters_are_counted_from_the_header(tmp_path):
    header = {"__metadata__": {"format": "pt"}, "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    text = json.dumps(header).encode()
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(24))
    assert prerequisites.count_parameters(tmp_path / "w.safetensors") == 6
