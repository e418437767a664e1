"""The whole forward pass against an independent NumPy implementation, layer by layer: pytest tests/unit/test_modeling_golden.py

The reference below is written from the formulas (RMSNorm, rotary embedding, grouped attention, top-k experts, gates), in
float64, token by token and head by head; it shares no line with transformers or with ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from selectmoe.modeling import SelectMoeConfig, SelectMoeForCausalLM

Array = np.ndarray
HEADS, GROUPS, TOP = 4, 2, 2
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "num_experts": 4,
    "num_experts_per_tok": TOP,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "initializer_range": 0.3,
    "quality_gate_init_std": 0.5,
}


def rms(x: Array, weight: Array) -> Array:
    return np.asarray(weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


class Reference:
    """One row [T] through the model."""

    def __init__(self, model: SelectMoeForCausalLM, custom: Callable[[Array], Array] | None = None) -> None:
        self.c, self.custom = model.config, custom
        self.w = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
        self.dim = getattr(self.c, "head_dim", None) or 32 // HEADS

    def linear(self, name: str, x: Array) -> Array:
        return np.asarray(x @ self.w[name + ".weight"].T + self.w.get(name + ".bias", 0.0))

    def heads(self, p: str, x: Array, kind: str, number: int) -> Array:
        """Queries, keys or values [T, heads, D], normed and clipped as the config says."""
        out = self.linear(f"{p}self_attn.{kind}_proj", x)
        if kind != "v" and self.c.qk_norm is True:
            out = rms(out, self.w[f"{p}self_attn.{kind}_norm.weight"])
        out = out.reshape(len(x), number, self.dim)
        if kind != "v" and self.c.qk_norm == "head":
            out = rms(out, self.w[f"{p}self_attn.{kind}_norm.weight"])
        return out if self.c.clip_qkv is None else np.clip(out, -self.c.clip_qkv, self.c.clip_qkv)

    def rotate(self, x: Array) -> Array:
        """Pairs (i, i + D/2) turned by position * theta^(-2i/D)."""
        half = self.dim // 2
        out = x.copy()
        for t in range(len(x)):
            for i in range(half):
                angle = t * self.c.rope_parameters["rope_theta"] ** (-2 * i / self.dim)
                a, b = x[t, :, i], x[t, :, i + half]
                out[t, :, i] = a * np.cos(angle) - b * np.sin(angle)
                out[t, :, i + half] = b * np.cos(angle) + a * np.sin(angle)
        return out

    def attention(self, p: str, h: Array) -> Array:
        q = self.rotate(self.heads(p, h, "q", HEADS))
        k = self.rotate(self.heads(p, h, "k", GROUPS))
        v = self.heads(p, h, "v", GROUPS)
        mixed = np.zeros((len(h), HEADS, self.dim))
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            for t in range(len(h)):  # a token sees itself and what is before it
                weights = softmax(k[: t + 1, group] @ q[t, head] / np.sqrt(self.dim))
                mixed[t, head] = weights @ v[: t + 1, group]
        return self.linear(f"{p}self_attn.o_proj", mixed.reshape(len(h), -1))

    def experts(self, p: str, h: Array, logits: Array) -> Array:
        out = np.zeros_like(h)
        for t, probs in enumerate(softmax(logits)):
            chosen = np.argsort(-probs)[:TOP]
            scale = probs[chosen].sum() if self.c.norm_topk_prob else 1.0
            for e in chosen:
                gate, up = np.split(self.w[f"{p}mlp.experts.gate_up_proj"][e] @ h[t], 2)
                out[t] += probs[e] / scale * (self.w[f"{p}mlp.experts.down_proj"][e] @ (gate * sigmoid(gate) * up))
        return out

    def trash(self, h: Array) -> Array:
        if self.custom is not None:
            return self.custom(h)
        if self.c.trash_expert_mode == "noise":  # its mean: nothing is drawn in eval mode
            return np.repeat(h.mean(-1, keepdims=True), h.shape[-1], -1)
        return np.zeros_like(h)

    def __call__(self, ids: Array) -> dict[str, Any]:
        x = self.w["model.embed_tokens.weight"][ids]
        found: dict[str, Any] = {"hidden_states": [x], "quality_score": [], "moe_logits": []}
        for layer in range(self.c.num_hidden_layers):
            p = f"model.layers.{layer}."
            a = x + self.attention(p, rms(x, self.w[p + "input_layernorm.weight"]))
            h = rms(a, self.w[p + "post_attention_layernorm.weight"])
            score, logits = self.linear(p + "quality_gate", h), h @ self.w[p + "mlp.gate.weight"].T
            moe = self.experts(p, h, logits)
            g = sigmoid(score)
            x = a + moe if self.c.gate_mode == "observer" else a + g * moe + (1 - g) * self.trash(h)
            for name, value in (("hidden_states", x), ("quality_score", score), ("moe_logits", logits)):
                found[name].append(value)
        found["hidden_states"][-1] = rms(x, self.w["model.norm.weight"])  # as transformers gives the last one
        found["logits"] = found["hidden_states"][-1] @ self.w["lm_head.weight"].T
        return found


VARIANTS: dict[str, dict[str, Any]] = {
    "observer": {},
    "applied, zero": {"gate_mode": "applied", "quality_gate_init_bias": 0.0},
    "applied, noise": {"gate_mode": "applied", "quality_gate_init_bias": 0.0, "trash_expert_mode": "noise"},
    "applied, custom": {"gate_mode": "applied", "quality_gate_init_bias": 0.0, "trash_expert_mode": "custom"},
    "no norm on queries and keys": {"qk_norm": False, "attention_bias": True},
    "a norm over each head": {"qk_norm": "head", "head_dim": 12},
    "clipped, normalised top-k": {"clip_qkv": 0.5, "norm_topk_prob": True, "rope_theta": 50.0},
    "tied embeddings": {"tie_word_embeddings": True, "gate_mode": "applied", "trash_expert_mode": "noise"},
}


@pytest.mark.parametrize(("name", "attention"), [*((name, "sdpa") for name in VARIANTS), ("applied, noise", "eager")])
def test_golden_every_layer_equals_the_numpy_forward_pass_with_padding_on_both_sides(name: str, attention: str) -> None:
    torch.manual_seed(0)
    model = SelectMoeForCausalLM(SelectMoeConfig(**SIZES, **VARIANTS[name])).eval()
    with torch.no_grad():  # weights that a norm or a bias keeps at one or zero would hide a mistake
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.set_attn_implementation(attention)
    custom = None
    if "custom" in name:
        model.set_trash_expert(lambda hidden, training: hidden.flip(-1) / 2)

        def custom(h: Array) -> Array:
            return h[..., ::-1] / 2

    reference, lengths = Reference(model, custom), (9, 5, 6)
    ids = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(5))
    valid = torch.zeros(3, 9, dtype=torch.long)
    for row, start in enumerate((0, 0, 3)):  # whole, padded on the right, padded on the left
        valid[row, start : start + lengths[row]] = 1
    with torch.inference_mode():
        out = model(
            ids.masked_fill(valid == 0, 1),
            attention_mask=valid,
            position_ids=(valid.cumsum(1) - 1).clamp(min=0),
            output_router_logits=True,
            output_hidden_states=True,
        )
    for row in range(3):
        here = valid[row].bool()
        want = reference(ids[row, here].numpy())
        for layer in range(3):
            for what, given in (
                ("hidden_states", out.hidden_states[layer + 1][row]),
                ("quality_score", out.quality_score[layer][row]),
                ("moe_logits", out.moe_logits[layer].reshape(3, 9, -1)[row]),
            ):
                expected = want[what][layer + (what == "hidden_states")]
                np.testing.assert_allclose(
                    given[here].numpy(), expected, rtol=1e-4, atol=1e-4, err_msg=f"{what}, layer {layer}, row {row}"
                )
        np.testing.assert_allclose(out.logits[row, here].numpy(), want["logits"], rtol=1e-4, atol=2e-4)
