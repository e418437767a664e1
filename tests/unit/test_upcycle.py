"""pytest tests/unit/test_upcycle.py"""

import json

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

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
            {"rows": 16, "threads": 1, **fields},
            source_model=str(dense),
            data=str(pool),
            output_dir=str(folder),
        )
    )


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 320}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS = {
    "llama, scaled positions": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0, "original_max_position_embeddings": 8}},
    ),
    "llama, biases and a head of its own size": (
        LlamaForCausalLM,
        LlamaConfig,
        {"attention_bias": True, "head_dim": 16, "eos_token_id": [2, 3]},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 64, "rms_norm_eps": 1e-3}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_dense_models_whatever_it_is(dense, small_pool, tmp_path, kind):
    """Random weights everywhere: norms and biases that a fresh model has at 1 and 0 would hide a mistake."""
    model_class, config_class, options = KINDS[kind]
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = model_class(config_class(**SIZES, **heads, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "dense")
    written = json.loads((tmp_path / "dense" / "config.json").read_text())
    for key in ("rms_norm_eps", "tie_word_embeddings", "hidden_act", "pad_token_id"):  # what people leave out
        if written.get(key) == config_class().to_dict().get(key):
            written.pop(key, None)
    (tmp_path / "dense" / "config.json").write_text(json.dumps(written))
    AutoTokenizer.from_pretrained(dense).save_pretrained(tmp_path / "dense")
    sparse = make(tmp_path / "dense", small_pool, tmp_path / "u", init="random" if "llama" in kind else "clusters")
    given = {"source_model": str(sparse), "output_dir": str(tmp_path / "c")}
    judge = load_judge(convert.run(load(convert.ConvertConfig, {}, **given)), "cpu", torch.float32)
    ids = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.inference_mode():
        expected, found = (m(ids, attention_mask=mask).logits[mask.bool()] for m in (model, judge))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    if kind == "mistral":
        assert judge.config.max_position_embeddings == 64


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


def test_the_number_of_threads_changes_no_byte(dense, small_pool, tmp_path):
    one, two = (make(dense, small_pool, tmp_path / str(n), threads=n) for n in (1, 2))
    assert read_manifest(one).identity == read_manifest(two).identity


def test_routers_of_the_data_spread_the_pools_tokens(dense, small_pool, tmp_path):
    """With `init=clusters` every layer uses its experts more evenly than its mean direction would let it."""
    from safetensors.torch import load_file

    tensors = load_file(make(dense, small_pool, tmp_path / "u") / "model.safetensors")
    config = load(upcycle.UpcycleConfig, {"rows": 16}, source_model=str(dense), data=str(small_pool), output_dir="o")
    source = upcycle.checkpoint.resolve(str(dense), upcycle.DENSE, "source_model")
    for layer, states in enumerate(upcycle.hidden_states(source, 3, config)):
        probabilities = (torch.from_numpy(states) @ tensors[f"model.layers.{layer}.mlp.gate.weight"].T).softmax(-1)
        entropy = -(probabilities * probabilities.log()).sum(-1).mean()
        assert abs(float(entropy) / np.log(4) - upcycle.ENTROPY_SHARE) < 0.01
        assert probabilities.argmax(-1).bincount(minlength=4).min() > 0


def test_expert_noise_makes_experts_differ_and_gives_routers_a_gradient(dense, small_pool, tmp_path):
    from safetensors.torch import load_file

    sizes = []
    for noise in (0.0, 0.1):
        sparse = make(dense, small_pool, tmp_path / f"u{noise}", expert_noise=noise, top_k=2)
        tensors = load_file(sparse / "model.safetensors")
        names = [f"model.layers.0.mlp.experts.{n}.up_proj.weight" for n in (0, 1)]
        assert torch.equal(*(tensors[name] for name in names)) == (noise == 0)
        given = {"source_model": str(sparse), "output_dir": str(tmp_path / f"c{noise}")}
        judge = load_judge(convert.run(load(convert.ConvertConfig, {}, **given)), "cpu", torch.float32)
        ids = torch.randint(0, 320, (2, 12), generator=torch.Generator().manual_seed(1))
        judge(ids, labels=ids).loss.backward()
        sizes.append(float(judge.model.layers[0].mlp.gate.weight.grad.norm()))
    assert sizes[1] > 100 * sizes[0]


def test_routers_spread_tokens_and_ignore_the_mean():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 16)) * 3
    states = (centres[np.repeat(np.arange(4), 50)] + rng.normal(size=(200, 16)) * 0.1 + 20).astype(np.float32)
    weights = upcycle.router(states, 4, seed=0)
    chosen = (states.astype(np.float64) @ weights.T).argmax(axis=1).reshape(4, 50)
    assert sorted(int(np.bincount(part).argmax()) for part in chosen) == [0, 1, 2, 3]
    mean = states.mean(axis=0)
    assert np.abs(weights @ (mean / np.linalg.norm(mean))).max() < 1e-3 * np.abs(weights).max() * 16


@pytest.mark.parametrize(
    "fields", [{"experts": 1}, {"top_k": 5}, {"init": "magic"}, {"rows": 0}, {"expert_noise": -1.0}]
)
def test_bad_values_are_refused(fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        load(upcycle.UpcycleConfig, fields, source_model="m", data="d", output_dir="o")


def test_more_layers_than_there_are(dense, small_pool, tmp_path):
    with pytest.raises(UserError, match="layers=9"):
        make(dense, small_pool, tmp_path / "u", layers=9)


def test_biases_in_the_mlp_are_refused():
    sizes = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 2}
    config = load(upcycle.UpcycleConfig, {}, source_model="x", data="y", output_dir="z")
    with pytest.raises(UserError, match="biases in its MLP"):
        upcycle.olmoe_config(sizes | {"mlp_bias": True}, config)


def test_a_config_that_does_not_say_how_large_the_model_is():
    with pytest.raises(UserError, match="has no num_attention_heads"):
        upcycle.olmoe_config(
            {"model_type": "llama"}, load(upcycle.UpcycleConfig, {}, source_model="x", data="y", output_dir="z")
        )
