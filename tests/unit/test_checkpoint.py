"""Checkpoints on disk. Run: pytest tests/unit/test_checkpoint.py"""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from selectmoe import checkpoint
from selectmoe.errors import UserError

TENSORS = {f"layer.{i}": torch.arange(6, dtype=torch.float32).reshape(2, 3) + i for i in range(5)}


def source(path: Path, shard_bytes: int = checkpoint.SHARD_BYTES, **config: Any) -> Path:
    path.mkdir()
    checkpoint.write_tensors(path, TENSORS.items(), shard_bytes)
    checkpoint.write_json(path / "config.json", {"model_type": "olmoe"} | config)
    return path


@pytest.mark.parametrize(("shard_bytes", "files"), [(10**9, 1), (50, 3), (1, 5)])
def test_tensors_come_back_from_any_number_of_shards(tmp_path: Path, shard_bytes: int, files: int) -> None:
    path = source(tmp_path / "a", shard_bytes)
    found = checkpoint.resolve(str(path), ("olmoe",), "source_model")
    assert len(found.shards) == files
    read = dict(checkpoint.read_tensors(path))
    assert set(read) == set(TENSORS) == set(checkpoint.tensor_places(path))
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    assert not list(path.glob("shard-*"))


def test_bytes_are_stable_and_there_is_one_metadata_key(tmp_path: Path) -> None:
    one, two = source(tmp_path / "a", 50), source(tmp_path / "b", 50)
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes()
    for file in one.glob("*.safetensors"):
        with safe_open(str(file), framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    twice = [("a", torch.zeros(1)), ("b", torch.zeros(1)), ("a", torch.zeros(1))]
    with pytest.raises(ValueError, match="written before"):
        checkpoint.write_tensors(tmp_path, twice, shard_bytes=4)


def test_what_is_not_a_checkpoint_gets_one_clear_line(tmp_path: Path) -> None:
    def said(path: Path | str) -> str:
        with pytest.raises(UserError) as caught:
            checkpoint.resolve(str(path), ("olmoe",), "source_model", "only OLMoE can be converted")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "does not exist" in said(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in said(tmp_path / "empty")
    assert "'llama', expected olmoe; only OLMoE" in said(source(tmp_path / "llama", model_type="llama"))
    broken = source(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    assert "not JSON" in said(broken)
    bare = source(tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    assert "no safetensors weights" in said(bare)
    torn = source(tmp_path / "torn", 50)
    (torn / "model-00002-of-00003.safetensors").unlink()
    assert "lacks the shard model-00002-of-00003" in said(torn)


def test_damaged_shards_and_doubled_tensors_are_named(tmp_path: Path) -> None:
    path = source(tmp_path / "a", 50)
    (path / "model-00001-of-00003.safetensors").write_bytes(b"nothing")
    for read in (lambda: list(checkpoint.read_tensors(path)), lambda: checkpoint.tensor_places(path)):
        with pytest.raises(UserError, match="model-00001-of-00003"):
            read()
    doubled = source(tmp_path / "b", 50)
    save_file({"layer.0": torch.zeros(1)}, doubled / "model-00002-of-00003.safetensors")
    with pytest.raises(UserError, match=r"layer\.0 twice"):
        list(checkpoint.read_tensors(doubled))


def test_a_hub_name_is_fetched_and_its_failure_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    path = source(tmp_path / "cached")
    asked: list[tuple[str, Any]] = []

    def fetch(name: str, **options: Any) -> str:
        asked.append((name, options["allow_patterns"]))
        if name == "allenai/nothing":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nand more")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    found = checkpoint.resolve("allenai/OLMoE-1B-7B-0125", ("olmoe",), "source_model")
    assert found.path == path
    assert asked[0][0] == "allenai/OLMoE-1B-7B-0125"
    patterns = asked[0][1]
    for name, taken in {"a.safetensors": True, "config.json": True, "tokenizer.json": True, "a.bin": False}.items():
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns) == taken
    with pytest.raises(UserError, match=r"neither a local folder nor a model that the hub gives: no network$"):
        checkpoint.resolve("allenai/nothing", ("olmoe",), "source_model")


def test_companions_are_copied_byte_for_byte(tmp_path: Path) -> None:
    path = source(tmp_path / "a")
    (path / "tokenizer.json").write_bytes(b'{"a": 1 }')
    (path / "generation_config.json").write_bytes(b"{}")
    (path / "training_args.bin").write_bytes(b"pickle")
    (tmp_path / "b").mkdir()
    assert checkpoint.copy_companions(path, tmp_path / "b") == ["tokenizer.json", "generation_config.json"]
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == b'{"a": 1 }'
    assert {p.name for p in (tmp_path / "b").iterdir()} == {"tokenizer.json", "generation_config.json"}


def test_the_index_is_what_transformers_reads(tmp_path: Path) -> None:
    path = source(tmp_path / "a", 50)
    index = json.loads((path / checkpoint.INDEX).read_text())
    assert set(index["weight_map"]) == set(TENSORS)
    assert index["metadata"]["total_size"] == 5 * 24
