"""From OLMoE to Select-MoE. Run: pytest tests/unit/test_convert.py"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from selectmoe import cache, checkpoint, convert, shards
from selectmoe.check import stage_configs
from selectmoe.cli import main
from selectmoe.config import load
from selectmoe.errors import Unavailable, UserError
from selectmoe.manifest import read_manifest
from selectmoe.modeling import OriginalOlmoe, SelectMoeConfig, SelectMoeForCausalLM, apply_gates, realign
from selectmoe.router_weights import router_parameters, save_router_weights
from selectmoe.run import RunConfig
from selectmoe.storage import S3Store
from tests.integration.stand_ins import Hub

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


def sharded(path: Path, **options: Any) -> Path:
    """The same checkpoint in several shards."""
    source = olmoe(path, **options)
    OlmoeForCausalLM.from_pretrained(source).save_pretrained(source, max_shard_size=8_000)
    (source / "model.safetensors").unlink()
    assert len(list(source.glob("*.safetensors"))) > 3
    return source


def test_shards_keep_their_names_and_the_result_is_the_source_and_the_gates(tmp_path: Path) -> None:
    source = sharded(tmp_path / "olmoe")
    out = convert.run(config(source, tmp_path / "out"))
    before, after = (sorted(path.glob("*.safetensors")) for path in (source, out))
    assert [p.name for p in before] == [p.name for p in after]
    grown = [b.stat().st_size - a.stat().st_size for a, b in zip(before, after, strict=True)]
    gates = 2 * (16 + 1) * 4
    assert all(abs(size) < 64 for size in grown[:-1])  # the padding of a header
    assert gates <= grown[-1] < gates + 600
    total = [json.loads((path / checkpoint.INDEX).read_text())["metadata"]["total_size"] for path in (source, out)]
    assert total[1] - total[0] == gates
    ids = torch.tensor([[3, 4]])
    want = OlmoeForCausalLM.from_pretrained(source)(ids).logits
    torch.testing.assert_close(SelectMoeForCausalLM.from_pretrained(out)(ids).logits, want)


def killed_in_shard(number: int, settings: convert.ConvertConfig) -> None:
    """Convert in another process, which dies by SIGKILL while it writes the shard of this number."""
    child = os.fork()
    if not child:
        real, count = shards.write, iter(range(100))

        def write(path: Path, tensors: list[shards.Planned]) -> None:
            if next(count) == number:
                path.write_bytes(b"half a shard")
                os.kill(os.getpid(), signal.SIGKILL)
            real(path, tensors)

        shards.write = write
        try:
            convert.run(settings)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def test_a_killed_conversion_goes_on_after_the_last_whole_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sharded(tmp_path / "olmoe")
    whole = convert.run(config(source, tmp_path / "whole"))
    settings = config(source, tmp_path / "out")
    killed_in_shard(2, settings)
    written: list[str] = []
    real = shards.write
    monkeypatch.setattr(shards, "write", lambda path, tensors: (written.append(path.name), real(path, tensors)))
    out = convert.run(settings)
    names = sorted(p.name for p in source.glob("*.safetensors"))
    assert written == [f"{name}.part" for name in names[2:]]
    assert read_manifest(out).identity == read_manifest(whole).identity
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}

    # Killed while the finished files were moved into place: they are moved back, not made again.
    (out / "manifest.json").rename(out / "manifest.json.part")
    staging = out / ".work" / "staging"
    staging.mkdir(parents=True)
    (out / names[-1]).rename(staging / names[-1])
    (out / ".work" / "key").write_text(read_manifest(whole).key)
    written.clear()
    assert read_manifest(convert.run(settings)).identity == read_manifest(whole).identity
    assert written == []
    assert {p.name for p in out.iterdir()} == {p.name for p in whole.iterdir()}


def test_from_s3_straight_to_s3_one_shard_at_a_time(
    tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    source = sharded(tmp_path / "olmoe")
    local = convert.run(config(source, tmp_path / "local"))
    cache.store(source, "s3://bucket/from/olmoe")
    settings = config("s3://bucket/from/olmoe", Path("unread"))
    settings.output_dir = "s3://bucket/to/judge"
    killed_in_shard(2, settings)
    names = sorted(p.name for p in source.glob("*.safetensors"))
    store = S3Store("s3://bucket/to/judge")
    assert {n for n in store.names() if not n.startswith(".work/")} == set(names[:2])
    s3.seen.clear()
    settings.source_model = str(source)  # the same bytes, hence the same work
    assert convert.run(settings) == "s3://bucket/to/judge"
    sent = [path.rpartition("/")[2] for _, path, _, _ in s3.requests("PUT")]
    assert [name for name in sent if name.endswith(".safetensors")] == names[2:]
    assert not (cache.root() / "outgoing").exists() or not list((cache.root() / "outgoing").iterdir())
    assert not [name for name in store.names() if name.startswith(".work/")]
    capsys.readouterr()
    brought, reference = cache.resolve_model("s3://bucket/to/judge")
    assert reference.digest == read_manifest(local).identity
    assert SelectMoeForCausalLM.from_pretrained(brought).config.model_type == "select_moe"

    s3.seen.clear()
    monkeypatch.chdir(tmp_path)
    assert main(["convert", f"source_model={source}", "output_dir=s3://bucket/to/judge"]) == 0
    assert capsys.readouterr().out == "s3://bucket/to/judge\n"
    assert s3.requests("PUT") == []
    assert not (tmp_path / "s3:").exists()
    settings.seed = 1
    with pytest.raises(UserError, match="s3://bucket/to/judge holds another run's output"):
        convert.run(settings)
    settings.output_dir = "s3://bucket/from"
    with pytest.raises(UserError, match=r"s3://bucket/from holds olmoe/.*not a finished output"):
        convert.run(settings)


def test_a_mistake_found_late_leaves_nothing_on_s3(tmp_path: Path, s3: Any) -> None:
    source = sharded(tmp_path / "olmoe")
    last = sorted(source.glob("*.safetensors"))[-1]
    tensors = load_file(last)
    tensors[sorted(tensors)[-1]][0] = 1e6
    save_file(tensors, last, metadata={"format": "pt"})
    settings = config(source, Path("unread"), dtype="float16")
    settings.output_dir = "s3://bucket/late"
    with pytest.raises(UserError, match=r"dtype=float16: the tensor .* holds values that it cannot"):
        convert.run(settings)
    assert S3Store("s3://bucket/late").names() == []


def test_the_licence_comes_along(tmp_path: Path) -> None:
    source = olmoe(tmp_path / "olmoe")
    for name in ("LICENSE", "NOTICE.txt"):
        (source / name).write_bytes(b"Apache License\r\n")
    out = convert.run(config(source, tmp_path / "out"))
    for name in ("LICENSE", "NOTICE.txt"):
        assert (out / name).read_bytes() == b"Apache License\r\n"


def test_spec7_17_a_checkpoint_that_is_not_the_one_of_its_config_is_refused(tmp_path: Path) -> None:
    source = olmoe(tmp_path / "olmoe")
    weights = source / "model.safetensors"
    whole = load_file(weights)

    def refused(tensors: dict[str, torch.Tensor], message: str) -> None:
        save_file(tensors, weights, metadata={"format": "pt"})
        with pytest.raises(UserError, match=message):
            convert.run(config(source, tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    refused({"a": torch.zeros(1)}, r"lacks \d+ of the \d+ tensors of its config, lm_head.weight first")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    refused({n: t for n, t in whole.items() if n != name}, f"lacks 1 of the .*{name}")
    refused(
        whole | {name: whole[name].T.contiguous()}, r"up_proj.weight has shape \[16, 8\], its config says \[8, 16\]"
    )
    refused(whole | {convert.gate_name(0, "bias"): torch.zeros(1)}, "it was converted before")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="was not copied whole"):
        convert.run(config(source, tmp_path / "out"))
    several = sharded(tmp_path / "several")
    index = json.loads((several / checkpoint.INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    (several / checkpoint.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"is wrong about model\.norm\.weight"):
        convert.run(config(several, tmp_path / "out"))


def test_a_full_disk_is_said_and_the_whole_shards_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sharded(tmp_path / "olmoe")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(Unavailable, match="GB left, the checkpoint takes"):
        convert.run(config(source, tmp_path / "out"))
    monkeypatch.undo()

    def full(file: Any, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards, "_all", full)
    with pytest.raises(Unavailable, match=r"No space left on device.*goes on from here"):
        convert.run(config(source, tmp_path / "out"))
    assert not list((tmp_path / "out").rglob("*.part"))


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
    assert one["model.layers.0.quality_gate.bias"] == 3
    assert SelectMoeConfig().quality_gate_init_bias == 3
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
    source = olmoe(tmp_path / "olmoe")
    out = convert.run(config(source, tmp_path / "out", dtype="bfloat16"))
    tensors = dict(checkpoint.read_tensors(out))
    assert all(torch.equal(tensors[n], t.bfloat16()) for n, t in checkpoint.read_tensors(source))
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


def test_an_observer_becomes_an_applied_gate_and_trained_weights_come_along(tmp_path: Path) -> None:
    source = olmoe(tmp_path / "olmoe", torch.bfloat16)
    observer = convert.run(config(source, tmp_path / "observer"))
    model = SelectMoeForCausalLM.from_pretrained(observer)
    with torch.no_grad():
        for parameter in router_parameters(model).values():
            parameter.add_(0.5)
    (tmp_path / "trained").mkdir()
    save_router_weights(model, tmp_path / "trained")
    asked = {"gain": 0.3, "bias": 2.0, "weights": str(tmp_path / "trained")}
    out = convert.run(config(observer, tmp_path / "applied", apply=asked))
    apply_gates(model, 0.3, 2.0)
    applied = SelectMoeForCausalLM.from_pretrained(out)
    assert applied.config.gate_mode == "applied"
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(applied(ids).logits, model(ids).logits)
    before, after = (dict(checkpoint.read_tensors(path)) for path in (source, out))
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor) == (not name.endswith("mlp.gate.weight"))
    was = dict(checkpoint.read_tensors(observer))
    for start in (3.0, 0.0):  # the whole score is scaled, the bias too
        began = {"quality_gate_init_bias": start}
        other = convert.run(config(source, tmp_path / f"began-{start}", model=began))
        made = convert.run(config(other, tmp_path / f"bare-{start}", apply={"gain": 2.0}))
        bare = dict(checkpoint.read_tensors(made))
        assert torch.equal(bare[convert.gate_name(0, "weight")], was[convert.gate_name(0, "weight")] * 2)
        assert bare[convert.gate_name(0, "bias")] == 2 * start + 3

    for path, keys, message in (
        (source, {"gain": 1.0}, "expected select_moe"),
        (out, {"gain": 1.0}, "has gate_mode=applied already"),
        (observer, {"gain": -1.0}, "must be above 0"),
        (observer, {"bias": 1.0}, "read with apply.gain only"),
        (observer, {"gain": 1.0, "weights": str(tmp_path / "observer")}, "do not exist"),
    ):
        with pytest.raises(UserError, match=message):
            convert.run(config(path, tmp_path / "bad", apply=keys))
    save_router_weights(torch.nn.Module(), tmp_path / "trained")
    with pytest.raises(UserError, match="no router weights"):
        convert.run(config(observer, tmp_path / "bad", apply=asked))
    assert not (tmp_path / "bad").exists()


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a server that speaks the hub's protocol, with nothing in the cache."""
    from huggingface_hub import constants

    source = olmoe(tmp_path / "olmoe")
    (source / "LICENSE").write_text("Apache License")
    (source / "pytorch_model.bin").write_bytes(b"a pickle")
    hub = Hub(source)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("SELECTMOE_MODEL_CACHE", str(tmp_path / "cache"))
    try:
        out = convert.run(config(hub.NAME, tmp_path / "out"))
    finally:
        hub.close()
    assert "pytorch_model.bin" not in hub.sent
    assert (out / "LICENSE").read_text() == "Apache License"
    before, after = (dict(checkpoint.read_tensors(path)) for path in (source, out))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_run_tells_verify_which_dtype_it_asked_convert_for() -> None:
    run = load(RunConfig, {"convert": {"dtype": "bfloat16"}}, data="d", source_model="m", output_dir="o")
    assert stage_configs(run)["verify"]["dtype"] == "bfloat16"
    with pytest.raises(UserError, match=r"verify\.dtype is set by the run itself"):
        load(RunConfig, {"verify": {"dtype": "bfloat16"}}, data="d", source_model="m", output_dir="o")


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
