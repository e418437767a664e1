"""The model: OLMoE to the bit, gates, gradients, checkpoints. Run: pytest tests/unit/test_modeling.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM

from selectmoe import allowed_code
from selectmoe.errors import UserError
from selectmoe.gates import GATE_MODES, TrashExpert
from selectmoe.losses import LOSSES
from selectmoe.modeling import (
    OriginalOlmoe,
    QualityGate,
    SelectMoeConfig,
    SelectMoeForCausalLM,
    apply_gates,
    load_judge,
    open_gates,
    realign,
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
        ("trash_expert_mode", "nois", "zero, noise, custom"),
        ("qk_norm", "heads", "True, False, head"),
        ("quality_loss_type", "os:system", r"names code, which no checkpoint may.*allow_code=\[os:system\] to warmup"),
        ("trash_expert_mode", "os:system", "names code, which no checkpoint may"),
        ("quality_loss_type", "sigmod", "did you mean sigmoid"),
    ],
)
def test_spec7_05_unknown_names_are_errors_that_list_the_known(key: str, value: str, known: str) -> None:
    with pytest.raises(UserError, match=known):
        SelectMoeConfig(**SIZES, **{key: value})


def test_spec7_06_initial_values_are_the_ones_asked_for() -> None:
    gates = judge(quality_gate_init_mean=0.7, quality_gate_init_std=0.0, quality_gate_init_bias=-1.5).model.layers
    assert all((layer.quality_gate.weight == 0.7).all() and layer.quality_gate.bias == -1.5 for layer in gates)
    for mode in GATE_MODES:
        assert judge(gate_mode=mode).model.layers[0].quality_gate.bias == 3
    spread = judge(hidden_size=1024, quality_gate_init_std=0.5).model.layers[0].quality_gate.weight.detach().std()
    assert abs(float(spread) - 0.5) < 0.05


def test_spec7_06_trash_mode_has_an_effect() -> None:
    ids = tokens()
    closed = {"gate_mode": "applied", "quality_gate_init_bias": -2.0}
    zero, noise = judge(**closed), judge(trash_expert_mode="noise", **closed)
    assert not torch.equal(zero(ids).logits, noise(ids).logits)
    assert torch.equal(noise(ids).logits, noise(ids).logits)  # its mean in eval mode
    hidden = torch.randn(1, 3, 4096) * torch.tensor([1.0, 2.0, 3.0])[None, :, None] + 5
    drawn = TrashExpert("noise").train()(hidden)
    assert drawn is not None
    torch.testing.assert_close(drawn.mean(-1), hidden.mean(-1), rtol=0.05, atol=0.1)
    torch.testing.assert_close(drawn.std(-1), hidden.std(-1), rtol=0.1, atol=0.1)


def scaled(hidden: torch.Tensor, training: bool) -> torch.Tensor:
    return hidden * (2 if training else 0.5)


def narrow(hidden: torch.Tensor, training: bool) -> torch.Tensor:
    return hidden[..., :1]


def test_a_custom_trash_expert_runs_where_the_caller_gives_it_and_no_checkpoint_names_code(tmp_path: Path) -> None:
    ids = tokens()
    model = judge(gate_mode="applied", quality_gate_init_bias=-2.0, trash_expert_mode="custom")
    with pytest.raises(UserError, match="no function for it"):
        model(ids)
    model.set_trash_expert(scaled)
    as_scaled = model(ids).logits
    assert not torch.equal(as_scaled, judge(gate_mode="applied", quality_gate_init_bias=-2.0)(ids).logits)
    assert not torch.equal(model.train()(ids).logits, as_scaled)
    model.set_trash_expert(narrow)
    with pytest.raises(UserError, match=r"gave \(2, 9, 1\) for hidden states of shape \(2, 9, 32\)"):
        model(ids)
    model.save_pretrained(tmp_path)
    assert "narrow" not in (tmp_path / "config.json").read_text()

    own = f"{__name__}:scaled"
    with pytest.raises(UserError, match=r"custom trash expert: name it with selector_model\.trash_expert="):
        load_judge(tmp_path, "cpu", torch.float32)
    with pytest.raises(UserError, match=r"add allow_code="):
        load_judge(tmp_path, "cpu", torch.float32, own)
    allowed_code.allow([own])
    assert torch.equal(load_judge(tmp_path, "cpu", torch.float32, own)(ids).logits, as_scaled)
    judge().save_pretrained(tmp_path / "observer")
    with pytest.raises(UserError, match="gate_mode=applied only"):
        load_judge(tmp_path / "observer", "cpu", torch.float32, own)
    allowed_code.allow([])

    text = (tmp_path / "config.json").read_text().replace('"custom"', '"os:system"')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="trash_expert_mode=os:system names code, which no checkpoint may"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("bias", [3.0, 0.0, -1.0])
def test_an_observer_becomes_an_applied_gate_with_gain_and_bias(bias: float) -> None:
    model, ids = judge(quality_gate_init_std=0.5, quality_gate_init_bias=bias), tokens()
    before = model(ids, output_router_logits=True).quality_score[0]
    apply_gates(model, 0.3, 3.0)
    after = model(ids, output_router_logits=True)
    torch.testing.assert_close(after.quality_score[0], 0.3 * before + 3.0)
    assert model.model.layers[0].quality_gate.bias.item() == pytest.approx(0.3 * bias + 3.0)
    assert not torch.equal(after.logits, judge(quality_gate_init_std=0.5)(ids).logits)
    fresh = judge(gate_mode="applied")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(ids).logits, after.logits)
    with pytest.raises(UserError, match="applied already"):
        apply_gates(model, 0.3, 3.0)


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


def test_a_cached_pass_records_scores_and_load_balancing_of_its_own_tokens_only() -> None:
    model, ids = judge(), tokens()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    past = model(ids[:, :5], attention_mask=mask[:, :5], use_cache=True).past_key_values
    rest = model(
        ids[:, 5:],
        attention_mask=mask,
        past_key_values=past,
        use_cache=True,
        output_router_logits=True,
        labels=ids[:, 5:],
    )
    assert [tuple(score.shape) for score in rest.quality_score] == [(2, 4, 1)] * 2
    assert rest.aux_loss.isfinite()
    assert rest.loss.isfinite()


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
