"""LoRA on a judge: trained by `warmup`, taken by `route`. Run: pytest tests/warmup/test_judge_adapters.py"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from selectmoe import convert, pool, route, warmup
from selectmoe.config import load
from selectmoe.errors import UserError
from selectmoe.judge_adapters import CONFIG, WEIGHTS
from selectmoe.manifest import read_manifest
from selectmoe.modeling import load_judge
from selectmoe.router_data import read_router_data
from selectmoe.router_weights import load_router_weights, router_parameters

LORA = {"r": 4, "alpha": 8.0, "target_modules": ["q_proj"]}


@pytest.fixture(scope="module")
def judge(small_judge):
    return small_judge("applied")


def train(judge, data, folder, **training):
    fields = {
        "epochs": 1,
        "batch_size": 8,
        "per_device_batch_size": 8,
        "learning_rate": 0.05,
        "mode": "lora",
        "rows": 8,
    }
    given = {"selector_model.path": judge, "data": str(data), "output_dir": str(folder), "holdout": str(data)}
    mapping = {"recipe": "legacy", "threads": 1, "training": {**fields, "lora": LORA, **training}}
    return warmup.run(load(warmup.WarmupConfig, mapping, **given))


@pytest.fixture(scope="module")
def adapter(judge, small_pool, tmp_path_factory):
    return train(judge, small_pool, tmp_path_factory.mktemp("lora") / "w")


def same(one, two):
    return all(torch.equal(p, dict(two.named_parameters())[name]) for name, p in one.named_parameters())


def test_routers_target_modules_and_whole_gates_are_trained_and_nothing_else(adapter):
    proof = json.loads((adapter / "warmup.json").read_text())
    parts = {name.split(".", 3)[3].replace(".default", "") for name in proof["trained"]}
    lora = {f"{place}.lora_{x}.weight" for place in ("mlp.gate", "self_attn.q_proj") for x in "AB"}
    assert parts == lora | {f"quality_gate.modules_to_save.{x}" for x in ("weight", "bias")}
    assert proof["frozen"]["sha256_before"] == proof["frozen"]["sha256_after"]
    tensors = load_file(adapter / WEIGHTS)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert all(t.abs().max() > 0 for name, t in tensors.items() if "lora_B" in name), "every adapter was trained"
    config = json.loads((adapter / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8.0, 0.0)
    assert (adapter / "tokenizer.json").is_file()


def test_spec7_07_route_takes_the_adapter_and_sees_what_training_saw(adapter, judge, small_pool, tmp_path):
    """The held-out rows' mean g after training is what `route` finds with the adapter, folder or file."""
    entries = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    told = [entry["value"] for entry in entries if entry["name"] == "eval/good_ratio/pool"]
    assert len(told) == 2
    assert abs(told[1] - told[0]) > 1e-3
    found = []
    for name, path in (("folder", adapter), ("file", adapter / WEIGHTS)):
        given = {"selector_model.path": judge, "model_checkpoint_path": str(path), "output_dir": str(tmp_path / name)}
        out = route.run(load(route.RouteConfig, {}, data=str(pool.locate(small_pool, "holdout")), **given))
        found.append(read_manifest(out).identity)
        assert read_router_data(out / "router_data").good_ratio.mean() == pytest.approx(told[1], abs=1e-5)
    assert found[0] == found[1]


def test_the_bytes_are_the_same_again_and_others_without_target_modules(adapter, judge, small_pool, tmp_path):
    again = train(judge, small_pool, tmp_path / "a")
    assert read_manifest(again).identity == read_manifest(adapter).identity
    routers = load_file(train(judge, small_pool, tmp_path / "b", lora={"r": 4}) / WEIGHTS)
    assert not any("q_proj" in name for name in routers)
    assert any("mlp.gate" in name for name in routers)


def test_a_bfloat16_judge_gets_float32_routers(adapter, judge):
    models = [load_judge(judge, "cpu", dtype) for dtype in (torch.float32, torch.bfloat16)]
    for model in models:
        load_router_weights(model, adapter)
    names = [name for name in router_parameters(models[0]) if ".mlp.gate." in name]
    for name in names:
        full, half = (router_parameters(model)[name] for model in models)
        assert half.dtype == torch.float32
        assert torch.allclose(full, half, atol=2e-3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {f"other.{name}": value for name, value in t.items()}, "not one of its 12 tensors belongs"),
        (lambda t: dict(sorted(t.items())[1:]), "lacks .*mlp.gate"),
        (lambda t: t | {"base_model.model.extra": torch.zeros(1)}, "has one too many: base_model.model.extra"),
        (lambda t: {name: value.flatten() for name, value in t.items()}, "has the shape"),
        (lambda t: {name: value * float("nan") for name, value in t.items()}, "not finite"),
    ],
)
def test_spec7_17_what_does_not_belong_is_refused_and_the_model_unchanged(adapter, judge, tmp_path, change, said):
    shutil.copytree(adapter, tmp_path / "a")
    save_file(change(load_file(adapter / WEIGHTS)), tmp_path / "a" / WEIGHTS)
    model = load_judge(judge, "cpu", torch.float32)
    with pytest.raises(UserError, match=said):
        load_router_weights(model, tmp_path / "a")
    assert same(model, load_judge(judge, "cpu", torch.float32))


def test_files_that_cannot_be_read_get_one_line(adapter, judge, tmp_path):
    model = load_judge(judge, "cpu", torch.float32)
    for name, content in ((WEIGHTS, b"junk"), (CONFIG, b"{")):
        folder = tmp_path / f"bad {name}"
        shutil.copytree(adapter, folder)
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            load_router_weights(model, folder)


@pytest.mark.parametrize("mode", ["full_rank", "lora"])
def test_spec7_17_what_was_trained_on_another_model_is_refused(adapter, judge, small_olmoe, small_pool, tmp_path, mode):
    """Another seed of the gates makes another model, of the same names and shapes: the manifest knows."""
    model = {"gate_mode": "applied", "quality_gate_init_std": 0.5}
    given = {"source_model": str(small_olmoe), "output_dir": str(tmp_path / "other")}
    other = convert.run(load(convert.ConvertConfig, {"model": model}, **given))
    weights = adapter
    if mode == "full_rank":
        weights = train(judge, small_pool, tmp_path / "w", mode="full_rank", lora={})
    given = {"selector_model.path": str(other), "model_checkpoint_path": str(weights)}
    config = load(route.RouteConfig, {}, data=str(small_pool), output_dir=str(tmp_path / "r"), **given)
    with pytest.raises(UserError, match="was trained on another model"):
        route.run(config)
    assert not (tmp_path / "r").exists()
