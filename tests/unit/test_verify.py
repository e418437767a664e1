"""The proof of a conversion, and that it sees every kind of damage. Run: pytest tests/unit/test_verify.py"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import olmoe, sharded

from selectmoe import checkpoint, convert, verify
from selectmoe.config import load
from selectmoe.errors import Refused, UserError
from selectmoe.modeling import SelectMoeForCausalLM
from selectmoe.pool import Row, write_pool

Tensors = dict[str, torch.Tensor]
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An original, and a plain folder with what `convert` made of it (no manifest: tests damage copies of it)."""
    root = tmp_path_factory.mktemp("pair")
    source = olmoe(root / "olmoe")
    options = {"source_model": str(source), "output_dir": str(root / "out"), "model.gate_mode": "applied"}
    made = convert.run(load(convert.ConvertConfig, {}, **options))
    shutil.copytree(made, root / "plain")
    (root / "plain" / "manifest.json").unlink()
    return source, root / "plain"


def check(original: Path, converted: Path, out: Path, **changes: Any) -> dict[str, Any]:
    paths = {"original_model": str(original), "converted_model": str(converted), "output_dir": str(out)}
    config = load(verify.VerifyConfig, {"max_length": 16, "threads": 1} | changes, **paths)
    report: dict[str, Any] = json.loads((verify.run(config) / "verify.json").read_text())
    return report


def refused(original: Path, converted: Path, out: Path) -> tuple[dict[str, Any], str]:
    with pytest.raises(Refused) as caught:
        check(original, converted, out)
    assert (out / "manifest.json").is_file()
    report: dict[str, Any] = json.loads((out / "verify.json").read_text())
    assert not report["equal"]
    return report, str(caught.value)


@pytest.mark.parametrize("mode", ["observer", "applied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spec7_16_a_true_conversion_passes(tmp_path: Path, mode: str, dtype: torch.dtype, capsys: Any) -> None:
    source = olmoe(tmp_path / "olmoe", dtype)
    options = {"source_model": str(source), "output_dir": str(tmp_path / "made"), "model.gate_mode": mode}
    made = convert.run(load(convert.ConvertConfig, {}, **options))
    report = check(source, made, tmp_path / "out")
    assert report["equal"]
    assert report["differences"] == []
    assert report["tensors"]["compared"] == len(checkpoint.tensor_places(source))
    forward = report["forward"]
    assert forward["dtype"] == str(dtype).removeprefix("torch.")
    assert forward["gate_open"]["logits"] == {"equal": True, "max_distance": 0, "mean_distance": 0}
    assert forward["gate_open"]["router_logits"]["equal"]
    assert forward["as_initialised"]["logits"]["equal"] == (mode == "observer")
    assert (forward["as_initialised"]["logits"]["max_distance"] > 0) == (mode == "applied")
    for found in forward["gate_open"]["layers"]:
        assert {what: gap["equal"] for what, gap in found.items()} == {"router_logits": True, "hidden_states": True}
    hidden = [layer["hidden_states"]["max_distance"] for layer in forward["as_initialised"]["layers"]]
    assert [gap > 0 for gap in hidden] == [mode == "applied"] * 2
    assert [gate["bias"] for gate in forward["gates"]] == [3.0] * 2
    said = capsys.readouterr().err
    assert said.count("equal") >= 5
    assert re.search(r"^    1 +3 +equal +equal", said, re.MULTILINE)


def flipped_bit(t: Tensors) -> None:
    t[Q].view(torch.int32)[0, 0] ^= 1


def negative_zero(t: Tensors) -> None:
    t[Q][:] = t[Q]
    t["model.norm.weight"].view(torch.int32)[0] ^= -(2**31)


def missing(t: Tensors) -> None:
    del t[Q]


def missing_gate(t: Tensors) -> None:
    del t["model.layers.1.quality_gate.bias"]


def extra(t: Tensors) -> None:
    t["model.layers.0.extra"] = torch.zeros(1)


def transposed(t: Tensors) -> None:
    t[Q] = t[Q].T.contiguous()


def transposed_shape(t: Tensors) -> None:
    name = "model.layers.0.mlp.gate.weight"
    t[name] = t[name].T.contiguous()


def renamed(t: Tensors) -> None:
    t["model.layers.0.self_attn.query.weight"] = t.pop(Q)


def other_dtype(t: Tensors) -> None:
    t[Q] = t[Q].to(torch.float64)


def swapped_experts(t: Tensors) -> None:
    one, two = (f"model.layers.0.mlp.experts.{n}.up_proj.weight" for n in (0, 1))
    t[one], t[two] = t[two].clone(), t[one].clone()


def gate_in_half(t: Tensors) -> None:
    name = "model.layers.0.quality_gate.weight"
    t[name] = t[name].bfloat16()


def nan_gate(t: Tensors) -> None:
    t["model.layers.1.quality_gate.weight"][0, 0] = torch.nan


MUTATIONS: list[tuple[Callable[[Tensors], None], str, str]] = [
    (flipped_bit, "changed", Q),
    (negative_zero, "changed", "model.norm.weight"),
    (missing, "missing", Q),
    (missing_gate, "missing", "model.layers.1.quality_gate.bias"),
    (extra, "extra", "model.layers.0.extra"),
    (transposed, "changed", Q),
    (transposed_shape, "changed", "model.layers.0.mlp.gate.weight"),
    (renamed, "missing", Q),
    (other_dtype, "changed", Q),
    (nan_gate, "changed", "model.layers.1.quality_gate.weight"),
    (swapped_experts, "changed", "model.layers.0.mlp.experts.0.up_proj.weight"),
    (gate_in_half, "changed", "model.layers.0.quality_gate.weight"),
]


@pytest.mark.parametrize(("mutate", "kind", "name"), MUTATIONS, ids=lambda x: getattr(x, "__name__", None))
def test_every_mutation_of_a_tensor_is_found_and_named(
    pair: tuple[Path, Path], tmp_path: Path, mutate: Callable[[Tensors], None], kind: str, name: str
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(pair[1], damaged)
    tensors = load_file(damaged / "model.safetensors")
    mutate(tensors)
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    report, said = refused(pair[0], damaged, tmp_path / "out")
    assert next(iter(report["tensors"][kind])) == name
    assert len(report["tensors"][kind]) == (2 if mutate is swapped_experts else 1)
    assert report["tensors"]["each"][name] not in ("", "equal")
    assert name in said
    if mutate is renamed:
        assert report["tensors"]["extra"] == ["model.layers.0.self_attn.query.weight"]


def test_another_tokenizer_or_config_is_found_and_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "tokenizer"
    shutil.copytree(pair[1], other)
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace('"the"', '"teh"'))
    report, said = refused(pair[0], other, tmp_path / "out")
    assert report["files"] == {"tokenizer.json": "changed"}
    assert "tokenizer.json" in said
    (other / "tokenizer.json").unlink()
    assert refused(pair[0], other, tmp_path / "out2")[0]["files"] == {"tokenizer.json": "missing"}

    bent = tmp_path / "config"
    shutil.copytree(pair[1], bent)
    settings = json.loads((bent / "config.json").read_text())
    checkpoint.write_json(bent / "config.json", settings | {"rms_norm_eps": 0.1})
    assert list(refused(pair[0], bent, tmp_path / "out3")[0]["config"]) == ["rms_norm_eps"]

    checkpoint.write_json(bent / "config.json", settings | {"clip_qkv": 1.0})
    assert refused(pair[0], bent, tmp_path / "out4")[0]["config"] == {"clip_qkv": [None, 1.0]}
    checkpoint.write_json(bent / "config.json", settings | {"dtype": "bfloat16"})
    assert list(refused(pair[0], bent, tmp_path / "out5")[0]["config"]) == ["dtype"]

    (other / "tokenizer.json").write_bytes((pair[0] / "tokenizer.json").read_bytes())
    (other / "LICENSE").write_text("mine now")
    (other / "generation_config.json").write_text("{}")
    report, said = refused(pair[0], other, tmp_path / "out6")
    assert report["files"] == {"LICENSE": "extra", "generation_config.json": "changed"}
    assert "file LICENSE; file generation_config.json" in said


def test_an_index_that_sends_a_tensor_elsewhere_is_found(tmp_path: Path) -> None:
    source = sharded(tmp_path / "olmoe")
    given = {"source_model": str(source), "output_dir": str(tmp_path / "made")}
    made = convert.run(load(convert.ConvertConfig, {}, **given))
    assert check(source, made, tmp_path / "out")["equal"]
    (made / "manifest.json").unlink()
    index = json.loads((made / checkpoint.INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    checkpoint.write_json(made / checkpoint.INDEX, index)
    assert refused(source, made, tmp_path / "out2")[0]["tensors"]["misplaced"] == ["model.norm.weight"]


def test_another_dtype_passes_only_where_it_was_asked_for(tmp_path: Path) -> None:
    source = olmoe(tmp_path / "olmoe")
    given = {"source_model": str(source), "output_dir": str(tmp_path / "made"), "dtype": "bfloat16"}
    made = convert.run(load(convert.ConvertConfig, {}, **given))
    report = check(source, made, tmp_path / "out", dtype="bfloat16")
    assert report["equal"]
    assert report["forward"]["dtype"] == "bfloat16"
    report, _ = refused(source, made, tmp_path / "out2")
    assert set(report["tensors"]["changed"].values()) == {"dtype float32 became bfloat16"}
    assert len(report["tensors"]["changed"]) == report["tensors"]["compared"]


def test_a_checkpoint_that_transformers_saved_again_is_still_the_same(pair: tuple[Path, Path], tmp_path: Path) -> None:
    again = tmp_path / "again"
    SelectMoeForCausalLM.from_pretrained(pair[1]).save_pretrained(again)
    for name in checkpoint.companions(pair[1]):
        shutil.copyfile(pair[1] / name, again / name)
    assert check(pair[0], again, tmp_path / "out")["equal"]


def test_a_custom_trash_expert_counts_as_zero(pair: tuple[Path, Path], tmp_path: Path) -> None:
    custom = tmp_path / "custom"
    shutil.copytree(pair[1], custom)
    settings = json.loads((custom / "config.json").read_text())
    checkpoint.write_json(custom / "config.json", settings | {"trash_expert_mode": "custom"})
    report = check(pair[0], custom, tmp_path / "out")
    assert report["equal"]
    assert not report["forward"]["as_initialised"]["logits"]["equal"]


def test_a_difference_is_refused_again_from_the_finished_output(pair: tuple[Path, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(pair[1], damaged)
    tensors = load_file(damaged / "model.safetensors")
    flipped_bit(tensors)
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    refused(pair[0], damaged, tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    refused(pair[0], damaged, tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


def test_text_comes_from_a_pool_where_one_is_given(pair: tuple[Path, Path], tmp_path: Path) -> None:
    rows = [Row("a", str(i), [{"role": "user", "content": "the is of"}]) for i in range(9)]
    write_pool(tmp_path / "pool", rows)
    (tmp_path / "pool").mkdir(exist_ok=True)
    assert verify.texts(str(tmp_path / "pool"), 3) == ["the is of"] * 3
    assert len(verify.texts("", 2)) == 2


def test_rows_zero_compares_tensors_only(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert "skipped" in check(*pair, tmp_path / "out", rows=0)["forward"]


def test_without_a_tokenizer_bytes_stand_for_tokens(tmp_path: Path) -> None:
    ids, mask = verify.encode(tmp_path, ["ab", "abcd"], 3, 64)
    assert ids.tolist() == [[97 % 64, 98 % 64, 0], [97 % 64, 98 % 64, 99 % 64]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1]]


def test_a_tokenizer_larger_than_the_embedding_is_a_clear_error(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="gives token 10, its embedding has 10: they do not fit"):
        verify.encode(pair[0], ["the a"], 8, 10)


def test_bad_input_is_one_line_and_leaves_nothing_behind(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for changes, message in (
        ({"rows": -1}, "rows=-1"),
        ({"max_length": 1}, "max_length"),
        ({"show": 0}, "show"),
        ({"dtype": "int8"}, "dtype"),
    ):
        with pytest.raises(UserError, match=message):
            check(*pair, out, **changes)
    with pytest.raises(UserError, match="expected select_moe"):
        check(pair[0], pair[0], out)
    with pytest.raises(UserError, match="expected olmoe"):
        check(pair[1], pair[1], out)
    assert not out.exists()
