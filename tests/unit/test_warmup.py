"""pytest tests/unit/test_warmup.py"""

import json

import pytest
import torch

from selectmoe import gate_training, warmup
from selectmoe.config import load
from selectmoe.errors import UserError
from selectmoe.manifest import read_manifest
from selectmoe.router_weights import read_router_weights
from selectmoe.storage import LocalStore


@pytest.fixture(scope="module")
def observer(small_judge):
    return small_judge("observer")


@pytest.fixture(scope="module")
def applied(small_judge):
    return small_judge("applied")


def config(judge, pool, folder, recipe="observer", **training):
    fields = {"epochs": 1, "batch_size": 8, "per_device_batch_size": 4, "rows": 16, "learning_rate": 0.05, **training}
    given = {"selector_model.path": judge, "data": str(pool), "output_dir": str(folder)}
    return load(warmup.WarmupConfig, {"recipe": recipe, "training": fields}, **given)


def last(out, name):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [entry["value"] for entry in lines if entry["name"] == name][-1]


def test_observers_learn_to_tell_rows_from_corrupted_copies(observer, small_pool, tmp_path):
    out = warmup.run(config(observer, small_pool, tmp_path / "w", epochs=6, corruptions=["random_chars"]))
    assert last(out, "good_ratio/pool") > last(out, "good_ratio/corrupted") + 0.02
    weights = read_router_weights(out)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())  # SPEC 7 (9)
    assert len((out / "warmup_rows.jsonl").read_text().splitlines()) == 16


def test_spec7_10_an_interrupted_warm_up_goes_on_to_the_same_bytes(observer, small_pool, tmp_path, monkeypatch):
    whole = warmup.run(config(observer, small_pool, tmp_path / "a", epochs=2))
    monkeypatch.setattr(gate_training, "COMMIT_SECONDS", -1.0)
    real = LocalStore.put_bytes

    class Power(Exception):
        pass

    def put_then_fail(self, name, data):
        real(self, name, data)
        if name == gate_training.STATE:
            raise Power

    monkeypatch.setattr(LocalStore, "put_bytes", put_then_fail)
    resumed = config(observer, small_pool, tmp_path / "b", epochs=2)
    with pytest.raises(Power):
        warmup.run(resumed)
    monkeypatch.setattr(LocalStore, "put_bytes", real)
    assert read_manifest(warmup.run(resumed)).identity == read_manifest(whole).identity


@pytest.mark.parametrize("loss", ["sigmoid", "mse"])
def test_spec7_01_the_quality_loss_moves_the_gates(applied, small_pool, tmp_path, loss):
    """A larger weight gives a smaller mean g after the same steps: the loss has a gradient."""
    bias = []
    for weight in (0.0, 1.0, 100.0):
        fields = {"quality_loss_type": loss, "quality_loss_weight": weight, "learning_rate": 1e-3, "epochs": 3}
        out = warmup.run(config(applied, small_pool, tmp_path / f"{weight}", "legacy", **fields))
        bias.append(last(out, "loss/quality"))
    assert bias[0] > bias[1] > bias[2]


def test_the_legacy_recipe_trains_routers_too(applied, small_pool, tmp_path):
    before = read_router_weights(warmup.run(config(applied, small_pool, tmp_path / "a", "legacy", learning_rate=1e-9)))
    after = read_router_weights(warmup.run(config(applied, small_pool, tmp_path / "b", "legacy")))
    assert all(not torch.allclose(before[name], after[name], atol=1e-5) for name in before)


def test_spec7_11_rows_without_a_learnable_token_are_an_error(observer, small_pool, tmp_path):
    with pytest.raises(UserError, match="max_length"):
        warmup.run(config(observer, small_pool, tmp_path / "w", max_length=2))
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("training", "recipe", "word"),
    [
        ({"batch_size": 8, "per_device_batch_size": 3}, "observer", "per_device_batch_size"),  # SPEC 7 (8)
        ({"batch_size": 0}, "observer", "batch_size"),
        ({"quality_loss_type": "sigmoid"}, "observer", "contrastive"),
        ({"train_routers": True}, "observer", "recipe=legacy"),
        ({"corruptions": ["magic"]}, "observer", "magic"),
        ({"subset_ratio": 0.0}, "observer", "subset_ratio"),
        ({}, "magic", "magic"),
    ],
)
def test_bad_values_are_refused(training, recipe, word, tmp_path):
    with pytest.raises(UserError, match=word):
        config("m", "d", tmp_path / "o", recipe, **training)


def test_a_recipe_needs_its_gate_mode(observer, small_pool, tmp_path):
    with pytest.raises(UserError, match="gate_mode=applied"):
        warmup.run(config(observer, small_pool, tmp_path / "w", "legacy"))
