"""pytest tests/unit/test_upcycle.py"""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from selectmoe import convert, upcycle
from selectmoe.config import load
from selectmoe.errors import UserError
from selectmoe.manifest import read_manifest
from selectmoe.modeling import load_judge


@pytest.fixture(scope="module")
def dense(small_olmoe, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 320}
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(small_olmoe).save_pretrained(folder)
    return folder


def make(dense, pool, folder, **fields):
    return upcycle.run(
        load(
            upcycle.UpcycleConfig,
            {"rows": 16, **fields},
            source_model=str(dense),
            data=str(pool),
            output_dir=str(folder),
        )
    )


@pytest.mark.parametrize("top_k", [1, 2])
def test_logits_are_the_dense_models(dense, small_pool, tmp_path, top_k):
    sparse = make(dense, small_pool, tmp_path / "u", top_k=top_k)
    given = {"source_model": str(sparse), "output_dir": str(tmp_path / "c")}
    judge = load_judge(convert.run(load(convert.ConvertConfig, {}, **given)), "cpu", torch.float32)
    ids = torch.randint(0, 320, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = LlamaForCausalLM.from_pretrained(dense).eval()(ids).logits
        torch.testing.assert_close(judge(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_same_bytes_twice_and_layers_can_be_cut(dense, small_pool, tmp_path):
    one, two = (make(dense, small_pool, tmp_path / name) for name in "ab")
    assert read_manifest(one).identity == read_manifest(two).identity
    cut = make(dense, small_pool, tmp_path / "c", layers=2)
    assert '"num_hidden_layers": 2' in (cut / "config.json").read_text()


def test_routers_spread_tokens_and_ignore_the_mean():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 16)) * 3
    states = (centres[np.repeat(np.arange(4), 50)] + rng.normal(size=(200, 16)) * 0.1 + 20).astype(np.float32)
    weights = upcycle.router(states, 4, seed=0)
    chosen = (states.astype(np.float64) @ weights.T).argmax(axis=1).reshape(4, 50)
    assert sorted(int(np.bincount(part).argmax()) for part in chosen) == [0, 1, 2, 3]
    mean = states.mean(axis=0)
    assert np.abs(weights @ (mean / np.linalg.norm(mean))).max() < 1e-3 * np.abs(weights).max() * 16


@pytest.mark.parametrize("fields", [{"experts": 1}, {"top_k": 5}, {"init": "magic"}, {"rows": 0}])
def test_bad_values_are_refused(fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        load(upcycle.UpcycleConfig, fields, source_model="m", data="d", output_dir="o")


def test_more_layers_than_there_are(dense, small_pool, tmp_path):
    with pytest.raises(UserError, match="layers=9"):
        make(dense, small_pool, tmp_path / "u", layers=9)
