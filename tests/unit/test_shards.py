"""Safetensors files as ranges of bytes. Run: pytest tests/unit/test_shards.py"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from selectmoe import shards
from selectmoe.errors import UserError

TENSORS = {
    "half": torch.arange(7, dtype=torch.bfloat16),
    "wide": torch.linspace(-3, 3, 40).reshape(5, 8),
    "count": torch.tensor([[1, 2]]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "CHUNK", 16)


def stored(path: Path) -> dict[str, shards.Stored]:
    save_file(TENSORS, path)
    return shards.read_header(path)


def test_what_is_copied_is_what_the_library_reads(tmp_path: Path) -> None:
    found = stored(tmp_path / "a")
    planned = [shards.copied(name, found[name]) for name in TENSORS] + [shards.given("new", torch.ones(3))]
    planned = shards.aligned(planned)
    shards.write(tmp_path / "b", planned)
    assert (tmp_path / "b").stat().st_size == shards.file_size(planned)
    read = load_file(tmp_path / "b")
    for name, tensor in (TENSORS | {"new": torch.ones(3)}).items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    again = shards.read_header(tmp_path / "b")
    width = {"F32": 4, "BF16": 2, "I64": 8}
    assert all(tensor.start % width[tensor.dtype] == 0 for tensor in again.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_cast_is_torchs_and_leaves_integers_alone(tmp_path: Path, dtype: str) -> None:
    found = stored(tmp_path / "a")
    shards.write(tmp_path / "b", shards.aligned(shards.cast(name, found[name], dtype) for name in TENSORS))
    read = load_file(tmp_path / "b")
    for name, tensor in TENSORS.items():
        assert torch.equal(read[name], tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor)


def test_a_difference_says_what_how_much_and_where(tmp_path: Path) -> None:
    before = stored(tmp_path / "a")
    changed = {name: tensor.clone() for name, tensor in TENSORS.items()}
    changed["wide"].view(torch.int32)[3, 5] ^= 1
    changed["wide"].view(torch.int32)[4, 7] ^= 1 << 30
    changed["half"] = changed["half"].float()
    changed["count"] = changed["count"].T.contiguous()
    save_file(changed, tmp_path / "b")
    after = shards.read_header(tmp_path / "b")
    said = {name: shards.difference(shards.copied(name, before[name]), after[name]) for name in TENSORS}
    assert said["wide"] == "bits: 2 of 40 values differ, the first at 29"
    assert said["half"] == "dtype bfloat16 became float32"
    assert said["count"] == "shape [1, 2] became [2, 1]"
    assert said["scalar"] == said["empty"] == ""


def test_files_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    stored(tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    for data, message in ((b"", "is not a safetensors file"), (whole[:-1], "not copied whole"), (b"x" * 99, "is not")):
        (tmp_path / "b").write_bytes(data)
        with pytest.raises(UserError, match=message):
            shards.read_header(tmp_path / "b")
