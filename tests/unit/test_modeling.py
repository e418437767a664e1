"""The model: OLMoE to the bit, gates, gradients, a golden NumPy forward. Run: pytest tests/unit/test_modeling.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM

from selectmoe.errors import UserError
from selectmoe.losses import LOSSES
from selectmoe.modeling import (
    OriginalOlmoe,
    QualityGate,
    SelectMoeConfig,
    SelectMoeForCausalLM,
    load_judge,
    open_gates,
    realign,
    trash,
)

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "initializer_range": 0.3,
}


def judge(**options: Any) -> SelectMoeForCausalLM:
    torch.manual_seed(0)
    model: SelectMoeForCausalLM = SelectMoeForCausalLM(SelectMoeConfig(**SIZES | options)).eval()
    return model


def original(**options: Any) -> OlmoeForCausalLM:
    torch.manual_seed(1)
    return OlmoeForCausalLM(OlmoeConfig(**SIZES | options)).eval()


def with_weights_of(olmoe: OlmoeForCausalLM, **options: Any) -> SelectMoeForCausalLM:
    model = judge(**options)
    left = model.load_state_dict(olmoe.state_dict(), strict=False)
    assert not left.unexpected_keys
    assert all("quality_gate" in key for key in left.missing_keys)
    return model


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["observer", "applied"])
def test_open_gates_equal_olmoe_to_the_bit(mode: str, dtype: torch.dtype) -> None:
    olmoe = original().to(dtype)
    model = with_weights_of(olmoe, gate_mode=mode, trash_expert_mode="noise").to(dtype)
    ids = tokens()
    want = olmoe(ids, output_router_logits=True)
    if mode == "observer":  # whatever the gates are
        as_is = model(ids, output_router_logits=True)
        assert torch.equal(as_is.logits, want.logits)
    else:
        assert not torch.equal(model(ids).logits, want.logits)
    open_gates(model)
    got = model(ids, output_router_logits=True)
    assert torch.equal(got.logits, want.logits)
    for ours, theirs in zip(got.moe_logits, want.router_logits, strict=True):
        assert torch.equal(ours, theirs.float())


def test_outputs_have_the_promised_shapes_and_are_float32() -> None:
    model = judge().to(torch.bfloat16)
    ids = tokens()
    out = model(ids, output_router_logits=True)
    base = model.model(input_ids=ids, output_router_logits=True, use_cache=False)
    for found in (out, base):
        assert [tuple(s.shape) for s in found.quality_score] == [(2, 9, 1)] * 2
        assert [tuple(s.shape) for s in found.moe_logits] == [(18, 4)] * 2
        assert {t.dtype for t in (*found.quality_score, *found.moe_logits)} == {torch.float32}
    assert base.last_hidden_state.shape == (2, 9, 32)
    assert "quality_score" not in model.model(ids)
    assert model(ids).quality_score is None


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return np.asarray(weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def numpy_layer(w: dict[str, np.ndarray], x: np.ndarray, p: str, applied: bool) -> tuple[np.ndarray, ...]:
    """One decoder layer for one row [T, H]: the new x, raw gate scores [T], raw router logits [T, E]."""
    length, dim, heads, kv = len(x), 8, 4, 2
    h = rms(x, w[p + "input_layernorm.weight"])
    q = rms(h @ w[p + "self_attn.q_proj.weight"].T, w[p + "self_attn.q_norm.weight"]).reshape(length, heads, dim)
    k = rms(h @ w[p + "self_attn.k_proj.weight"].T, w[p + "self_attn.k_norm.weight"]).reshape(length, kv, dim)
    v = (h @ w[p + "self_attn.v_proj.weight"].T).reshape(length, kv, dim)
    angle = np.arange(length)[:, None] / 10000.0 ** (np.arange(0, dim, 2) / dim)
    cos, sin = (np.concatenate([f(angle)] * 2, -1)[:, None] for f in (np.cos, np.sin))

    def rotate(t: np.ndarray) -> np.ndarray:
        return np.asarray(t * cos + np.concatenate([-t[..., dim // 2 :], t[..., : dim // 2]], -1) * sin)

    q, k = rotate(q), rotate(k)
    mixed = np.zeros((length, heads, dim))
    for head in range(heads):
        scores = q[:, head] @ k[:, head // 2].T / np.sqrt(dim)
        scores[np.triu_indices(length, 1)] = -np.inf
        mixed[:, head] = softmax(scores) @ v[:, head // 2]
    a = x + mixed.reshape(length, -1) @ w[p + "self_attn.o_proj.weight"].T
    h = rms(a, w[p + "post_attention_layernorm.weight"])
    score = h @ w[p + "quality_gate.weight"][0] + w[p + "quality_gate.bias"][0]
    logits = h @ w[p + "mlp.gate.weight"].T
    probs = softmax(logits)
    out = np.zeros_like(a)
    for t in range(length):
        for e in np.argsort(-probs[t])[:2]:
            gate, up = np.split(w[p + "mlp.experts.gate_up_proj"][e] @ h[t], 2)
            out[t] += probs[t, e] * (w[p + "mlp.experts.down_proj"][e] @ (gate / (1 + np.exp(-gate)) * up))
    good = 1 / (1 + np.exp(-score)) if applied else np.ones(length)
    return a + good[:, None] * out, score, logits


@pytest.mark.parametrize("mode", ["observer", "applied"])
def test_golden_router_logits_and_gate_against_numpy(mode: str) -> None:
    model = judge(gate_mode=mode, quality_gate_init_std=0.5)
    w = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    ids = tokens(1, 7)
    out = model(ids, output_router_logits=True)
    x = w["model.embed_tokens.weight"][ids[0].numpy()]
    for layer in range(2):
        x, score, logits = numpy_layer(w, x, f"model.layers.{layer}.", mode == "applied")
        np.testing.assert_allclose(out.quality_score[layer][0, :, 0].detach().numpy(), score, atol=2e-5)
        np.testing.assert_allclose(out.moe_logits[layer].detach().numpy(), logits, atol=2e-5)
    want = rms(x, w["model.norm.weight"]) @ w["lm_head.weight"].T
    np.testing.assert_allclose(out.logits[0].detach().numpy(), want, atol=1e-4)


CHECKPOINTING = [None, {"use_reentrant": True}, {"use_reentrant": False}]


def gate_gradients(model: SelectMoeForCausalLM, checkpointing: dict[str, bool] | None, frozen: bool) -> torch.Tensor:
    """One backward pass; only gates and routers learn where `frozen`."""
    for name, p in model.named_parameters():
        p.grad = None
        p.requires_grad_(not frozen or "quality_gate" in name or "mlp.gate" in name)
    model.train()
    if checkpointing is not None:
        model.activation_checkpointing_enable(checkpointing)
    ids = tokens()
    answer = torch.arange(9)[None] > 4
    out = model(
        ids,
        labels=ids,
        attention_mask=torch.ones_like(ids),
        output_router_logits=True,
        row_labels=torch.tensor([1, 0]),
        answer_mask=answer.expand(2, -1),
    )
    out.loss.backward()
    grads = [m.weight.grad.flatten() for m in model.modules() if isinstance(m, QualityGate)]
    routers = [layer.mlp.gate.weight.grad.flatten() for layer in model.model.layers]
    return torch.cat(grads + routers)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("mode", ["observer", "applied"])
@pytest.mark.parametrize("name", LOSSES)
def test_spec7_01_02_every_loss_has_the_same_gate_gradient_with_and_without_checkpointing(
    name: str, mode: str, frozen: bool
) -> None:
    found = []
    for checkpointing in CHECKPOINTING:
        weighty = judge(gate_mode=mode, quality_loss_type=name, quality_loss_weight=100.0, enable_load_balancing=True)
        found.append(gate_gradients(weighty, checkpointing, frozen))
    assert found[0].isfinite().all()
    gates = found[0][: 2 * 32].reshape(2, 32)
    assert (gates.abs().max(1).values > 0).all()
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-8)
    plain = judge(gate_mode=mode, quality_loss_type=name, quality_loss_weight=0.0, enable_load_balancing=True)
    assert not torch.equal(gate_gradients(plain, {"use_reentrant": True}, frozen), found[0])


@pytest.mark.parametrize("name", ["sigmoid", "mse"])
def test_spec7_01_mean_gate_falls_with_the_weight_of_the_quality_loss(name: str) -> None:
    means = []
    for weight in (0.0, 1.0, 100.0):
        model = judge(quality_loss_type=name, quality_loss_weight=weight).train()
        model.activation_checkpointing_enable()
        optimiser = torch.optim.SGD([p for n, p in model.named_parameters() if "quality_gate" in n], lr=1.0)
        ids = tokens()
        for _ in range(5):
            optimiser.zero_grad()
            out = model(ids, labels=ids, output_router_logits=True)
            out.loss.backward()
            optimiser.step()
        scores = torch.cat(model(ids, output_router_logits=True).quality_score).detach()
        means.append(float(torch.sigmoid(scores).mean()))
    assert means[0] > means[1] > means[2]


def test_spec7_04_load_balancing_is_real_masks_padding_and_enters_the_loss() -> None:
    model = judge(enable_load_balancing=True, quality_loss_weight=0.0, router_aux_loss_coef=0.5)
    ids = tokens(1)
    out = model(ids, labels=ids, output_router_logits=True)
    assert out.aux_loss > 0
    torch.testing.assert_close(out.loss, out.ce_loss + 0.5 * out.aux_loss)
    padded = torch.cat([ids, torch.ones_like(ids)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], 1)
    again = model(padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100), output_router_logits=True)
    torch.testing.assert_close(again.aux_loss, out.aux_loss)
    model.config.enable_load_balancing = False  # read at every call
    assert model(ids, labels=ids, output_router_logits=True).loss == out.ce_loss


def test_loss_is_the_stated_sum_and_the_config_is_read_at_every_call() -> None:
    model = judge()
    ids = tokens()
    without = model(ids, labels=ids)
    assert torch.equal(without.loss, without.ce_loss)
    for name, weight in (("sigmoid", 3.0), ("mse", 7.0)):
        model.config.quality_loss_type, model.config.quality_loss_weight = name, weight
        out = model(ids, labels=ids, output_router_logits=True)
        torch.testing.assert_close(out.loss, out.ce_loss + 0.01 * weight * out.quality_loss)
    want = torch.nn.functional.cross_entropy(out.logits[:, :-1].reshape(-1, 96), ids[:, 1:].reshape(-1))
    torch.testing.assert_close(out.ce_loss, want)
    torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=32).loss, want * 16 / 32)


def test_contrastive_learns_cross_entropy_on_clean_rows_only_and_says_what_it_lacks() -> None:
    model = judge(quality_loss_type="contrastive", quality_loss_weight=0.0)
    ids = tokens()
    mask = torch.ones_like(ids)
    both = model(ids, labels=ids, output_router_logits=True, row_labels=torch.tensor([1, 0]), answer_mask=mask)
    clean = model(ids[:1], labels=ids[:1])
    torch.testing.assert_close(both.loss, clean.loss)
    with pytest.raises(UserError, match="row_labels"):
        model(ids, labels=ids, output_router_logits=True)


def test_spec7_03_11_one_valid_token_and_rows_without_learnable_tokens_stay_finite() -> None:
    ids = tokens()
    mask = torch.zeros_like(ids)
    mask[0, 0] = 1
    for name in LOSSES:
        model = judge(quality_loss_type=name).train()
        labels = torch.full_like(ids, -100)
        out = model(
            ids,
            attention_mask=mask,
            labels=labels,
            output_router_logits=True,
            row_labels=torch.tensor([1, 0]),
            answer_mask=mask,
        )
        out.loss.backward()
        assert out.loss.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("key", "value", "known"),
    [
        ("gate_mode", "aplied", "observer, applied"),
        ("trash_expert_mode", "nois", "zero, noise"),
        ("quality_loss_type", "sigmod", "did you mean sigmoid"),
    ],
)
def test_spec7_05_unknown_names_are_errors_that_list_the_known(key: str, value: str, known: str) -> None:
    with pytest.raises(UserError, match=known):
        SelectMoeConfig(**SIZES, **{key: value})


def test_spec7_06_initial_values_are_the_ones_asked_for() -> None:
    gates = judge(quality_gate_init_mean=0.7, quality_gate_init_std=0.0, quality_gate_init_bias=-1.5).model.layers
    assert all((layer.quality_gate.weight == 0.7).all() and layer.quality_gate.bias == -1.5 for layer in gates)
    assert judge().model.layers[0].quality_gate.bias == 0
    assert judge(gate_mode="applied").model.layers[0].quality_gate.bias == 3
    spread = judge(hidden_size=1024, quality_gate_init_std=0.5).model.layers[0].quality_gate.weight.detach().std()
    assert abs(float(spread) - 0.5) < 0.05


def test_spec7_06_trash_mode_has_an_effect() -> None:
    ids = tokens()
    closed = {"gate_mode": "applied", "quality_gate_init_bias": -2.0}
    zero, noise = judge(**closed), judge(trash_expert_mode="noise", **closed)
    assert not torch.equal(zero(ids).logits, noise(ids).logits)
    assert torch.equal(noise(ids).logits, noise(ids).logits)  # its mean in eval mode
    hidden = torch.randn(1, 3, 4096) * torch.tensor([1.0, 2.0, 3.0])[None, :, None] + 5
    drawn = trash(hidden, "noise", training=True)
    assert drawn is not None
    torch.testing.assert_close(drawn.mean(-1), hidden.mean(-1), rtol=0.05, atol=0.1)
    torch.testing.assert_close(drawn.std(-1), hidden.std(-1), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_spec7_12_13_left_padding_and_causality_hold(attention: str) -> None:
    model = judge(gate_mode="applied", _attn_implementation=attention)
    model.set_attn_implementation(attention)
    ids = tokens(1)
    want = model(ids, output_router_logits=True)
    padded = torch.cat([torch.ones(1, 4, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0] * 4 + [1] * 9])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = model(padded, attention_mask=mask, position_ids=positions, output_router_logits=True)
    torch.testing.assert_close(got.logits[:, 4:], want.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.quality_score[1][:, 4:], want.quality_score[1], rtol=1e-4, atol=1e-4)
    changed = ids.clone()
    changed[0, -1] = 3 + (changed[0, -1] + 1) % 90
    torch.testing.assert_close(model(changed).logits[:, :-1], want.logits[:, :-1])


def test_spec7_14_cache_and_generation_agree_with_a_full_pass() -> None:
    model = judge(gate_mode="applied")
    ids = tokens(1)
    with_cache = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
    without = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(with_cache, without)
    past = model(ids[:, :5], use_cache=True).past_key_values
    rest = model(ids[:, 5:], past_key_values=past, use_cache=True).logits
    torch.testing.assert_close(rest, model(ids).logits[:, 5:], rtol=1e-4, atol=1e-4)


def test_save_and_load_to_the_bit_through_auto_classes(tmp_path: Path) -> None:
    model = judge(gate_mode="applied", tie_word_embeddings=True, norm_topk_prob=True, rope_theta=500.0)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(again, SelectMoeForCausalLM)
    assert again.config.rope_parameters["rope_theta"] == 500.0
    realign(again)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_gates_stay_float32_in_a_bfloat16_judge(tmp_path: Path) -> None:
    judge().save_pretrained(tmp_path)
    loaded = load_judge(tmp_path, "cpu", torch.bfloat16)
    assert not loaded.training
    assert loaded.model.layers[0].quality_gate.weight.dtype == torch.float32
    assert loaded.model.layers[0].mlp.gate.weight.dtype == torch.bfloat16
    loaded.model.layers[0].mlp.gate.weight.data = loaded.model.layers[0].mlp.gate.weight.float()  # as warm-up trains it
    assert loaded(tokens(), output_router_logits=True).logits.dtype == torch.bfloat16
    original().save_pretrained(tmp_path / "olmoe")
    with pytest.raises(UserError, match="selectmoe convert"):
        load_judge(tmp_path / "olmoe", "cpu", torch.float32)


def test_without_qk_norm_there_are_no_such_parameters_and_both_models_agree() -> None:
    model = judge(qk_norm=False)
    assert not [name for name, _ in model.named_parameters() if "q_norm" in name or "k_norm" in name]
    olmoe = OriginalOlmoe(OlmoeConfig(**SIZES, qk_norm=False)).eval()
    olmoe.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(olmoe(tokens()).logits, model(tokens()).logits)


def test_top1_with_norm_topk_prob_weighs_its_expert_fully() -> None:
    model = judge(num_experts_per_tok=1, norm_topk_prob=True)
    _, weights, _ = model.model.layers[0].mlp.gate(torch.randn(5, 32))
    assert torch.equal(weights, torch.ones(5, 1))


def test_the_fastest_experts_back_end_is_the_default_and_can_be_changed() -> None:
    model = judge()
    kinds = (OlmoeForCausalLM, OriginalOlmoe)
    backends = [kind(OlmoeConfig(**SIZES)).config._experts_implementation for kind in kinds]
    assert [model.config._experts_implementation, *backends] == ["grouped_mm"] * 3
    want = model(tokens()).logits
    model.set_experts_implementation("eager")
    torch.testing.assert_close(model(tokens()).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["observer", "applied"])
def test_an_observer_sends_no_gradient_into_the_model(mode: str) -> None:
    model = judge(gate_mode=mode).train()
    sum(score.sum() for score in model(tokens(), output_router_logits=True).quality_score).backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and "quality_gate" not in name}
    assert bool(touched) == (mode == "applied")
