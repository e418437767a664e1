"""What Select-MoE adds to OLMoE: the configuration's keys, the quality gate, the trash expert, and the layer that has them.

No command runs this module; `selectmoe.modeling` builds the model of these layers.
"""

# mypy: disable-error-code="misc, untyped-decorator"
# transformers carries no types: its classes and decorators are Any to mypy.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeAttention, OlmoeDecoderLayer, OlmoeRMSNorm, OlmoeTopKRouter

from selectmoe.allowed_code import names_code
from selectmoe.errors import UserError
from selectmoe.loss_parameters import check_loss

GATE_MODES = ("observer", "applied")
TRASH_MODES = ("zero", "noise", "custom")
QK_NORMS = (True, False, "head")

TrashFunction = Callable[[Tensor, bool], Tensor]
"""(hidden states [B, T, H], whether the model trains) -> [B, T, H]."""


@strict
class SelectMoeConfig(OlmoeConfig):
    """OLMoE's configuration and the keys of the quality gates.

    Attributes:
        quality_gate_init_mean: mean of the gates' initial weights.
        quality_gate_init_std: their standard deviation.
        quality_gate_init_bias: initial bias, so that a fresh gate says 0.95 of every token: an applied gate of bias 0 would
            halve every MoE output, and observers trained from +3 rank best (docs/experiments/judge.md).
        gate_mode: `observer` (the gate only reads) or `applied` (it scales the MoE's output).
        trash_expert_mode: what takes the MoE's place where an applied gate closes: `zero`; `noise` (normal with the
            token's mean and standard deviation; its mean in eval mode); `custom` (a callable that whoever loads the model
            gives, by `set_trash_expert`: a checkpoint never names code).
        quality_loss_type: a name in `selectmoe.losses.LOSSES`.
        quality_loss_weight: its weight, before `router_aux_loss_coef`.
        quality_loss_params: its parameters; what is not given has its default.
        enable_load_balancing: add transformers' load-balancing loss.
        qk_norm: True: OLMoE's norm over all heads; `head`: one over each head; False: none. With the last two an
            upcycled dense model is exact.
    """

    model_type = "select_moe"

    quality_gate_init_mean: float = 0.0
    quality_gate_init_std: float = 0.02
    quality_gate_init_bias: float = 3.0
    gate_mode: str = "observer"
    trash_expert_mode: str = "zero"
    quality_loss_type: str = "sigmoid"
    quality_loss_weight: float = 1.0
    quality_loss_params: dict[str, Any] | None = None
    enable_load_balancing: bool = False
    qk_norm: bool | str = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Refuse unknown names.

        Raises:
            UserError: an unknown gate mode, trash expert, norm or loss, or a trash expert that is an import path.
        """
        if names_code(self.trash_expert_mode):
            raise UserError(
                f"trash_expert_mode={self.trash_expert_mode} names code, which no checkpoint may: write custom there, "
                f"and give selector_model.trash_expert={self.trash_expert_mode} with allow_code on the command line"
            )
        for key, known in (("gate_mode", GATE_MODES), ("trash_expert_mode", TRASH_MODES), ("qk_norm", QK_NORMS)):
            if getattr(self, key) not in known:
                raise UserError(f"{key}={getattr(self, key)!r} is unknown; known: {', '.join(map(str, known))}")
        check_loss(self.quality_loss_type, self.quality_loss_params)
        super().__post_init__(**kwargs)


class QualityGate(nn.Linear):
    """[.., H] -> raw quality score [.., 1], computed in float32."""

    def __init__(self, hidden_size: int) -> None:
        """A gate over hidden states of `hidden_size`."""
        super().__init__(hidden_size, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """The raw score of every token, float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight.float(), self.bias.float())


class QualityScore(nn.Identity):
    """Where the score is recorded: after the gate, so that what an adapter around the gate adds is seen."""


class TrashExpert(nn.Module):
    """What takes the MoE's place where an applied gate closes; no parameters."""

    def __init__(self, mode: str) -> None:
        """A trash expert of one of `TRASH_MODES`; a custom one has no function yet."""
        super().__init__()
        self.mode = mode
        self.function: TrashFunction | None = None

    def forward(self, hidden: Tensor) -> Tensor | None:
        """[B, T, H] -> [B, T, H]; None where it is zero.

        Raises:
            UserError: a custom expert without its function, or whose result is no tensor of that shape.
        """
        if self.mode == "zero":
            return None
        if self.mode == "custom":
            return self._custom(hidden)
        still = hidden.detach()
        mean = still.mean(-1, keepdim=True)
        if not self.training:
            return mean.expand_as(still)
        return mean + still.std(-1, keepdim=True, correction=0) * torch.randn_like(still)

    def _custom(self, hidden: Tensor) -> Tensor:
        if self.function is None:
            raise UserError(
                "trash_expert_mode=custom: the model has no function for it: selector_model.trash_expert= names it, "
                "or set_trash_expert gives it"
            )
        out = self.function(hidden, self.training)
        if not isinstance(out, Tensor) or out.shape != hidden.shape:
            found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise UserError(f"the custom trash expert gave {found} for hidden states of shape {tuple(hidden.shape)}")
        return out.to(hidden.dtype)


class HeadRMSNorm(OlmoeRMSNorm):
    """OLMoE's norm over each head alone: weight [D], as some dense models have it."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, heads * D] -> the same shape."""
        normed: Tensor = super().forward(hidden_states.view(*hidden_states.shape[:-1], -1, self.weight.numel()))
        return normed.flatten(-2)


def set_qk_norm(attention: OlmoeAttention, config: OlmoeConfig) -> None:
    """Replace OLMoE's norms on queries and keys where the config says so."""
    kind = getattr(config, "qk_norm", True)
    if kind == "head":
        attention.q_norm = HeadRMSNorm(attention.head_dim, config.rms_norm_eps)
        attention.k_norm = HeadRMSNorm(attention.head_dim, config.rms_norm_eps)
    elif not kind:
        attention.q_norm = nn.Identity()
        attention.k_norm = nn.Identity()


class SelectMoeRouter(OlmoeTopKRouter):
    """OLMoE's router, whose weight may be float32 in a bfloat16 model while it is trained."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Raw logits [B*T, E], top-k weights in the dtype of the hidden states, top-k indices."""
        logits, weights, indices = super().forward(hidden_states.to(self.weight.dtype))
        return logits, weights.to(hidden_states.dtype), indices


class SelectMoeDecoderLayer(OlmoeDecoderLayer):
    """OLMoE's decoder layer with a quality gate that reads what the MoE block reads."""

    def __init__(self, config: SelectMoeConfig, layer_idx: int) -> None:
        """Build layer `layer_idx`."""
        super().__init__(config, layer_idx)
        self.gate_mode = config.gate_mode
        self.mlp.gate = SelectMoeRouter(config)
        self.quality_gate = QualityGate(config.hidden_size)
        self.quality_score = QualityScore()
        self.trash = TrashExpert(config.trash_expert_mode)
        set_qk_norm(self.self_attn, config)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """[B, T, H] -> [B, T, H]."""
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states), attention_mask=attention_mask, **kwargs
        )
        residual: Tensor = hidden_states + attended
        hidden = self.post_attention_layernorm(residual)
        moe: Tensor = self.mlp(hidden)
        if self.gate_mode == "observer":
            self.quality_score(self.quality_gate(hidden.detach()))  # recorded by a hook; changes nothing
            return residual + moe
        good = torch.sigmoid(self.quality_score(self.quality_gate(hidden)))
        out = residual + good.to(moe.dtype) * moe
        other = self.trash(hidden)
        return out if other is None else out + (1 - good).to(other.dtype) * other
