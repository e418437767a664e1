"""Trained router weights, in the seed's file and in ours. Run: pytest tests/unit/test_router_weights.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from selectmoe.errors import UserError
from selectmoe.modeling import SelectMoeConfig, SelectMoeForCausalLM
from selectmoe.router_weights import (
    LEGACY,
    NATIVE,
    from_seed,
    load_router_weights,
    read_router_weights,
    router_parameters,
    save_router_weights,
    to_seed,
)


def judge(seed: int = 0, **options: Any) -> SelectMoeForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "eos_token_id": 2}
    return SelectMoeForCausalLM(
        SelectMoeConfig(**(sizes | {"num_attention_heads": 2, "num_experts": 4, "num_experts_per_tok": 2} | options))
    )


def same(one: SelectMoeForCausalLM, two: SelectMoeForCausalLM) -> bool:
    return all(torch.equal(p, router_parameters(two)[name]) for name, p in router_parameters(one).items())


def rewrite(path: Path, change: Any) -> Path:
    """A damaged copy of the native file."""
    tensors = load_file(path / NATIVE)
    change(tensors)
    save_file(tensors, path / "changed.safetensors")
    return path / "changed.safetensors"


def test_number_of_trained_parameters() -> None:
    layers, hidden, experts = 2, 16, 4
    assert sum(p.numel() for p in router_parameters(judge()).values()) == layers * (hidden + 1 + experts * hidden)


def test_the_seeds_form_is_as_documented(tmp_path: Path) -> None:
    model = judge()
    save_router_weights(model, tmp_path)
    saved = torch.load(tmp_path / LEGACY, weights_only=True)
    assert set(saved) == {"full_rank_weights", "mode", "target_patterns", "tokenizer_saved"}
    assert saved["mode"] == "parameter"
    assert saved["target_patterns"] == ["quality_gate", ".gate.weight", "router"]
    assert saved["tokenizer_saved"] is False
    shapes = {name: list(t.shape) for name, t in saved["full_rank_weights"].items() if ".0." in name}
    assert shapes == {
        "model.layers.0.quality_gate.gate.weight": [1, 16],
        "model.layers.0.quality_gate.gate.bias": [1],
        "model.layers.0.normal_moe.gate.weight": [4, 16],
    }
    assert {from_seed(to_seed(name)) for name in router_parameters(model)} == set(router_parameters(model))


def test_bytes_do_not_depend_on_the_folder(tmp_path: Path) -> None:
    for name in ("a", "another"):
        (tmp_path / name).mkdir()
        save_router_weights(judge(), tmp_path / name)
    for file in (LEGACY, NATIVE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "another" / file).read_bytes()


def test_spec7_18_file_of_either_form_and_folder_all_load(tmp_path: Path) -> None:
    model = judge(1)
    save_router_weights(model, tmp_path)
    for path in (tmp_path, tmp_path / LEGACY, tmp_path / NATIVE):
        other = judge(2)
        assert not same(model, other)
        load_router_weights(other, path)
        assert same(model, other)


def test_a_file_of_the_predecessor_has_no_bias_and_that_is_said(tmp_path: Path, capsys: Any) -> None:
    save_router_weights(judge(1), tmp_path)
    saved = torch.load(tmp_path / LEGACY, weights_only=True)
    saved["full_rank_weights"] = {k: v for k, v in saved["full_rank_weights"].items() if "bias" not in k}
    torch.save(saved, tmp_path / "old.pt")
    model = judge(2, quality_gate_init_bias=5.0)
    load_router_weights(model, tmp_path / "old.pt")
    assert model.model.layers[1].quality_gate.bias == 0
    assert "no gate biases" in capsys.readouterr().err


def test_dtype_of_the_file_is_kept(tmp_path: Path) -> None:
    save_router_weights(judge(1), tmp_path)
    model = judge(2).to(torch.bfloat16)
    load_router_weights(model, tmp_path)
    assert model.model.layers[0].mlp.gate.weight.dtype == torch.float32
    assert model(torch.tensor([[3, 4, 5]])).logits.dtype == torch.bfloat16


def test_spec7_17_what_does_not_belong_is_refused_and_the_model_unchanged(tmp_path: Path) -> None:
    save_router_weights(judge(1), tmp_path)
    gate = "model.layers.1.quality_gate.weight"
    cases: list[tuple[Any, str]] = [
        (lambda t: t.pop(gate), f"lacks {gate}"),
        (lambda t: t.pop("model.layers.0.quality_gate.bias"), "lacks model.layers.0.quality_gate.bias"),
        (
            lambda t: t.update({"model.layers.7.mlp.gate.weight": torch.zeros(4, 16)}),
            "holds model.layers.7.mlp.gate.weight",
        ),
        (lambda t: t.update({gate: torch.zeros(1, 8)}), r"the shape \(1, 8\), the model's is \(1, 16\)"),
        (lambda t: t.update({gate: torch.full((1, 16), torch.nan)}), "not finite"),
        (lambda t: [t.pop(k) for k in list(t)] and t.update({"other": torch.zeros(1)}), "not one of its 1 tensors"),
    ]
    for change, message in cases:
        model = judge(2)
        with pytest.raises(UserError, match=message):
            load_router_weights(model, rewrite(tmp_path, change))
        assert same(model, judge(2))


def test_files_that_cannot_be_read_get_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="do not exist; expected"):
        read_router_weights(tmp_path / "nothing.pt")
    with pytest.raises(UserError, match="do not exist; expected"):
        read_router_weights(tmp_path)
    (tmp_path / "junk.pt").write_bytes(b"junk")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    torch.save({"model": 1}, tmp_path / "other.pt")
    for name in ("junk.pt", "junk.safetensors", "other.pt"):
        with pytest.raises(UserError) as caught:
            read_router_weights(tmp_path / name)
        assert "\n" not in str(caught.value)


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/tmp/selectmoe-was-here"),))


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    torch.save({"full_rank_weights": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="cannot be read as router weights"):
        read_router_weights(tmp_path / "evil.pt")
    assert not Path("/tmp/selectmoe-was-here").exists()
