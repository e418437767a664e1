"""From OLMoE to Select-MoE. Run: pytest tests/unit/test_convert.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from selectmoe import checkpoint, convert
from selectmoe.config import load
from selectmoe.errors import UserError
from selectmoe.manifest import read_manifest
from selectmoe.modeling import OriginalOlmoe, SelectMoeForCausalLM, realign

WORDS = ["<eos>", "<pad>", "<unk>", "the", "is", "of", "and", "to", "it", "in", "a", "."]


def olmoe(path: Path, dtype: torch.dtype = torch.float32, fused: bool = False, **options: Any) -> Path:
    """A tiny OLMoE checkpoint with a tokenizer."""
    torch.manual_seed(3)
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "initializer_range": 0.2,
    }
    kind = OlmoeForCausalLM if options.get("qk_norm", True) else OriginalOlmoe
    model = kind(OlmoeConfig(**sizes | options)).to(dtype)
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.save_pretrained(path, save_original_format=not fused)
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(path)
    return path


def config(source: Path | str, out: Path, **changes: Any) -> convert.ConvertConfig:
    return load(convert.ConvertConfig, changes, source_model=str(source), output_dir=str(out))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spec7_15_every_tensor_keeps_bits_and_dtype_and_the_tokenizer_comes_along(
    tmp_path: Path, dtype: torch.dtype, fused: bool
) -> None:
    source = olmoe(tmp_path / "olmoe", dtype, fused)
    out = convert.run(config(source, tmp_path / "out"))
    before, after = dict(checkpoint.read_tensors(source)), dict(checkpoint.read_tensors(out))
    assert any(name.endswith("experts.gate_up_proj") for name in before) == fused
    for name, tensor in before.items():
        assert after[name].dtype == dtype
        assert bits(after[name]) == bits(tensor)
    gates = set(after) - set(before)
    assert gates == {f"model.layers.{i}.quality_gate.{k}" for i in range(2) for k in ("weight", "bias")}
    assert {after[name].dtype for name in gates} == {torch.float32}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert AutoTokenizer.from_pretrained(out)("the is")["input_ids"] == [3, 4]

    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert isinstance(model, SelectMoeForCausalLM)
    assert model.dtype == dtype
    assert model.generation_config.temperature == 0.7
    assert torch.equal(model.model.layers[1].quality_gate.weight, after["model.layers.1.quality_gate.weight"])
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    before_model = OlmoeForCausalLM.from_pretrained(source).eval()
    for loaded in (model, before_model):
        realign(loaded)
    want, got = (m(ids, output_router_logits=True) for m in (before_model, model))
    assert torch.equal(got.logits, want.logits)
    for ours, theirs in zip(got.moe_logits, want.router_logits, strict=True):
        assert torch.equal(ours, theirs.float())


def test_shards_stay_bounded_and_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = olmoe(tmp_path / "olmoe")
    real, sizes = checkpoint.write_tensors, 8_000
    monkeypatch.setattr(checkpoint, "write_tensors", lambda directory, tensors: real(directory, tensors, sizes))
    out = convert.run(config(source, tmp_path / "out"))
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2
    assert max(p.stat().st_size for p in shards) < 2 * sizes
    ids = torch.tensor([[3, 4]])
    want = OlmoeForCausalLM.from_pretrained(source)(ids).logits
    torch.testing.assert_close(SelectMoeForCausalLM.from_pretrained(out)(ids).logits, want)


def test_spec7_06_gates_are_as_asked_seeded_per_layer_and_the_config_says_so(tmp_path: Path) -> None:
    source = olmoe(tmp_path / "olmoe")
    asked = {
        "quality_gate_init_mean": 0.25,
        "quality_gate_init_std": 0.0,
        "gate_mode": "applied",
        "trash_expert_mode": "noise",
    }
    out = convert.run(config(source, tmp_path / "asked", model=asked))
    tensors = dict(checkpoint.read_tensors(out))
    assert (tensors["model.layers.0.quality_gate.weight"] == 0.25).all()
    assert tensors["model.layers.0.quality_gate.bias"] == 3
    written = json.loads((out / "config.json").read_text())
    assert written["model_type"] == "select_moe"
    assert {k: written[k] for k in asked} == asked

    one = dict(checkpoint.read_tensors(convert.run(config(source, tmp_path / "one"))))
    two = dict(checkpoint.read_tensors(convert.run(config(source, tmp_path / "two", seed=43))))
    gates = [f"model.layers.{i}.quality_gate.weight" for i in range(2)]
    assert not torch.equal(one[gates[0]], one[gates[1]])
    assert not torch.equal(one[gates[0]], two[gates[0]])
    assert one["model.layers.0.quality_gate.bias"] == 0
    wide, _ = convert.initial_gate(
        0,
        {"hidden_size": 4096, "quality_gate_init_std": 0.5, "quality_gate_init_mean": 0, "quality_gate_init_bias": 0},
        1,
    )
    assert float(wide.std()) == pytest.approx(0.5, rel=0.1)


def test_same_work_same_identity_anywhere_and_a_second_run_does_nothing(tmp_path: Path) -> None:
    source = olmoe(tmp_path / "olmoe")
    a = read_manifest(convert.run(config(source, tmp_path / "a")))
    b = read_manifest(convert.run(config(source, tmp_path / "b", threads=1, work_root=str(tmp_path / "work"))))
    assert a.identity == b.identity
    before = (tmp_path / "a" / "manifest.json").read_bytes()
    convert.run(config(source, tmp_path / "a"))
    assert (tmp_path / "a" / "manifest.json").read_bytes() == before
    with pytest.raises(UserError, match="another run's output"):
        convert.run(config(source, tmp_path / "a", seed=1))


def test_dtype_is_cast_only_when_asked(tmp_path: Path) -> None:
    out = convert.run(config(olmoe(tmp_path / "olmoe"), tmp_path / "out", dtype="bfloat16"))
    tensors = dict(checkpoint.read_tensors(out))
    assert {t.dtype for name, t in tensors.items() if "quality_gate" not in name} == {torch.bfloat16}
    assert SelectMoeForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_options_of_the_original_are_carried_over(tmp_path: Path) -> None:
    source = olmoe(tmp_path / "olmoe", qk_norm=False, tie_word_embeddings=True, norm_topk_prob=True, rope_theta=123.0)
    assert not any("q_norm" in name for name in checkpoint.tensor_places(source))
    model = SelectMoeForCausalLM.from_pretrained(convert.run(config(source, tmp_path / "out"))).eval()
    assert model.config.rope_parameters["rope_theta"] == 123.0
    assert not model.config.qk_norm
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(model(ids).logits, OriginalOlmoe.from_pretrained(source).eval()(ids).logits)


def test_no_tokenizer_is_said(tmp_path: Path, capsys: Any) -> None:
    source = olmoe(tmp_path / "olmoe")
    for name in checkpoint.TOKENIZER_FILES:
        (source / name).unlink(missing_ok=True)
    convert.run(config(source, tmp_path / "out"))
    assert "has no tokenizer" in capsys.readouterr().err


def test_bad_input_is_one_line_and_leaves_nothing_behind(tmp_path: Path) -> None:
    source = olmoe(tmp_path / "olmoe")
    out = tmp_path / "out"
    cases: list[tuple[Any, str]] = [
        ({"dtype": "int8"}, "dtype=int8 is unknown; known: keep"),
        ({"model": {"gate_mode": "open"}}, "known: observer, applied"),
        ({"model": {"trash_expert_mode": "bin"}}, "known: zero, noise"),
        ({"model": {"quality_loss_type": "beta"}}, "beta_moment_matching"),
        ({"model": {"quality_gate_init_std": -1.0}}, "must not be negative"),
        ({"model": {"gate": 1}}, "unknown key"),
    ]
    for changes, message in cases:
        with pytest.raises(UserError, match=message):
            convert.run(config(source, out, **changes))
    with pytest.raises(UserError, match="does not exist"):
        convert.run(config(tmp_path / "nowhere", out))
    (source / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(UserError, match="'gpt2', expected olmoe"):
        convert.run(config(source, out))
    assert not out.exists()


def test_the_config_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, selectmoe.convert, selectmoe.verify; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
