"""pytest tests/unit/test_pretrain.py"""

import json
import time
from types import SimpleNamespace

import pytest

from selectmoe import pretrain
from selectmoe.config import load
from selectmoe.errors import UserError
from selectmoe.manifest import read_manifest

SIZES = {"hidden_size": 32, "intermediate_size": 32, "steps": 5, "vocab_size": 320}


def test_same_bytes_twice(small_pool, small_olmoe, tmp_path):
    again = pretrain.run(load(pretrain.PretrainConfig, SIZES, data=str(small_pool), output_dir=str(tmp_path / "m")))
    assert read_manifest(again).identity == read_manifest(small_olmoe).identity


def test_spec7_10_interrupted_training_goes_on_to_the_same_bytes(small_pool, small_olmoe, tmp_path, monkeypatch):
    config = load(pretrain.PretrainConfig, SIZES, data=str(small_pool), output_dir=str(tmp_path / "m"))
    monkeypatch.setattr(pretrain, "COMMIT_SECONDS", -1.0)

    class Power(Exception):
        pass

    from selectmoe.storage import LocalStore

    real = LocalStore.put_bytes

    def put_then_fail(self, name, data):
        real(self, name, data)
        if name == pretrain.STATE:
            raise Power

    monkeypatch.setattr(LocalStore, "put_bytes", put_then_fail)
    with pytest.raises(Power):
        pretrain.run(config)
    monkeypatch.setattr(LocalStore, "put_bytes", real)
    restarted = time.time()
    out = pretrain.run(config)
    assert read_manifest(out).identity == read_manifest(small_olmoe).identity
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == list(range(config.steps))
    # It went on from the commit: a training from the start would give the same bytes too.
    assert [m["step"] for m in metrics if m["time"] < restarted] == [0]


def test_it_learns(small_pool, tmp_path):
    sizes = SIZES | {"steps": 30}
    out = pretrain.run(load(pretrain.PretrainConfig, sizes, data=str(small_pool), output_dir=str(tmp_path / "m")))
    losses = [json.loads(line)["value"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize(
    "bad",
    [
        {"hidden_size": 30},
        {"experts": 1},
        {"top_k": 9},
        {"vocab_size": 10},
        {"steps": 0},
        {"learning_rate": 2.0},
        {"max_length": 1},
    ],
)
def test_bad_sizes_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        load(pretrain.PretrainConfig, bad, data="d", output_dir="o")


def test_a_tokenizer_of_ones_own(small_pool, small_olmoe, tmp_path):
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    given = {"data": str(small_pool), "tokenizer": str(small_olmoe), "output_dir": str(tmp_path / "m")}
    out = pretrain.run(load(pretrain.PretrainConfig, sizes, **given))
    assert (out / "tokenizer.json").read_bytes() == (small_olmoe / "tokenizer.json").read_bytes()
    assert set(read_manifest(out).inputs) == {"pool", "tokenizer"}
    with pytest.raises(UserError, match="vocab_size"):
        load(pretrain.PretrainConfig, SIZES, **given)


def test_a_tokenizer_that_is_none(small_pool, tmp_path):
    for name, word in (("nothing", "is no folder"), (".", "no tokenizer")):
        given = {"data": str(small_pool), "tokenizer": str(tmp_path / name), "output_dir": str(tmp_path / "m")}
        with pytest.raises(UserError, match=word):
            pretrain.run(load(pretrain.PretrainConfig, {}, **given))
    assert not (tmp_path / "m").exists()


def test_a_training_that_diverges_is_an_error(small_pool, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "math", SimpleNamespace(isfinite=lambda value: False))
    given = {"data": str(small_pool), "output_dir": str(tmp_path / "m")}
    with pytest.raises(UserError, match="lower learning_rate"):
        pretrain.run(load(pretrain.PretrainConfig, SIZES, **given))
    assert not (tmp_path / "m").exists()
