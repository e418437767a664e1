"""pytest tests/unit/test_pretrain.py"""

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
    assert read_manifest(pretrain.run(config)).identity == read_manifest(small_olmoe).identity


def test_it_learns(small_pool, tmp_path):
    import json

    sizes = SIZES | {"steps": 30}
    out = pretrain.run(load(pretrain.PretrainConfig, sizes, data=str(small_pool), output_dir=str(tmp_path / "m")))
    losses = [json.loads(line)["value"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("bad", [{"hidden_size": 30}, {"experts": 1}, {"top_k": 9}, {"vocab_size": 10}, {"steps": 0}])
def test_bad_sizes_are_refused(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        load(pretrain.PretrainConfig, bad, data="d", output_dir="o")
