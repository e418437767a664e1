"""What a pool can be read with: `pytest tests/unit/test_families.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from selectmoe import families
from selectmoe.errors import UserError
from selectmoe.judge import Batch, Listening
from selectmoe.modeling import SelectMoeConfig, SelectMoeForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
EXPERTS: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2}
QWEN: dict[str, Any] = {**EXPERTS, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
MODELS = {
    "select_moe": lambda: SelectMoeForCausalLM(SelectMoeConfig(**SIZES, **EXPERTS)),
    "olmoe": lambda: tf.OlmoeForCausalLM(tf.OlmoeConfig(**SIZES, **EXPERTS)),
    "qwen2_moe": lambda: tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**SIZES, **QWEN, shared_expert_intermediate_size=16)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**SIZES, **QWEN, head_dim=8)),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=97, n_embd=32, n_head=4, n_layer=3, n_positions=64)),
}
MOE = [name for name in MODELS if "moe" in name]


@pytest.fixture
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    torch.manual_seed(0)
    MODELS[request.param]().eval().save_pretrained(tmp_path / request.param)
    return str(tmp_path / request.param)


def batch(rows: int = 3, length: int = 11) -> Batch:
    ids = torch.randint(2, 97, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(length) < torch.tensor([[length], [7], [2]])
    return Batch(ids, mask, mask & (torch.arange(length) >= 2))


def heard(family: families.Family) -> dict[str, np.ndarray]:
    work = batch()
    with torch.inference_mode(), Listening(family, work) as listening:
        family.model.base_model(input_ids=work.ids, attention_mask=work.mask.long(), use_cache=False)
    return listening.arrays()


@pytest.mark.parametrize("checkpoint", MOE, indirect=True)
def test_no_router_or_gate_sees_that_the_last_experts_are_left_out(checkpoint: str) -> None:
    whole, less = (families.load(checkpoint, torch.device("cpu")) for _ in range(2))
    less.skip_last_experts()
    a, b = heard(whole), heard(less)
    assert a["router_probs"].shape == (3, 3, 5)
    assert ("quality_score" in a) == ("select_moe" in checkpoint)
    assert a.keys() == b.keys()
    assert all(a[name].tobytes() == b[name].tobytes() for name in a)
    assert sum(isinstance(m, families.NoExperts) for m in less.model.modules()) == 1 + ("qwen2" in checkpoint)


@pytest.mark.parametrize("checkpoint", MOE, indirect=True)
def test_what_is_heard_is_what_the_routers_compute(checkpoint: str) -> None:
    family = families.load(checkpoint, torch.device("cpu"))
    found = heard(family)["router_probs"]
    work = batch()
    inputs: list[torch.Tensor] = []
    hooks = [
        router.register_forward_pre_hook(lambda m, args: inputs.append(args[0].clone())) for router in family.routers
    ]
    with torch.inference_mode():
        family.model.base_model(input_ids=work.ids, attention_mask=work.mask.long(), use_cache=False)
    for hook in hooks:
        hook.remove()
    for layer, (router, hidden) in enumerate(zip(family.routers, inputs, strict=True)):
        weight: Any = router.weight
        logits = hidden.reshape(-1, 32).double().numpy() @ weight.detach().double().numpy().T
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        probs = (probs / probs.sum(-1, keepdims=True)).reshape(3, 11, 5)
        for row, mask in enumerate(work.mask.numpy()):
            assert np.allclose(found[row, layer], probs[row][mask].mean(0), atol=1e-6)


@pytest.mark.parametrize("checkpoint", ["llama", "gpt2"], indirect=True)
def test_a_dense_model_has_no_router_and_embeds(checkpoint: str) -> None:
    family = families.load(checkpoint, torch.device("cpu"))
    assert family.embeds
    assert heard(family) == {}
    assert family.model.get_output_embeddings() is not None


def test_other_models_are_refused(tmp_path: Path) -> None:
    tf.BertModel(
        tf.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match=r"model_type 'bert', expected .*give a Select-MoE, OLMoE, Qwen-MoE or dense"):
        families.load(str(tmp_path / "bert"), torch.device("cpu"))
    torch.manual_seed(0)
    MODELS["olmoe"]().save_pretrained(tmp_path / "olmoe")
    with pytest.raises(UserError, match=r"trash_expert is read by Select-MoE checkpoints only"):
        families.load(str(tmp_path / "olmoe"), torch.device("cpu"), "some.module:function")
