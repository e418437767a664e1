"""Select-MoE: OLMoE with a quality gate beside every MoE block, as a transformers model (`model_type: select_moe`).

No command runs this module; importing it registers the Auto classes::

    import selectmoe.modeling
    model = AutoModelForCausalLM.from_pretrained("out/convert")

Decoder layer, with x the residual stream [B, T, H]:

    a  = x + Attn(RMSNorm(x))
    h  = RMSNorm(a)
    s  = w_q . h + b_q                   quality score, raw, float32
    x' = a + MoE(h)                      gate_mode observer: h detached for the gate; the function stays OLMoE's to the bit
    x' = a + g MoE(h) + (1 - g) Trash(h) gate_mode applied, g = sigmoid(s)

Everything else *is* OLMoE: this file subclasses and does not rewrite it. A base model that is asked for
`output_router_logits` gives, per layer, `quality_score` [B, T, 1] and `moe_logits` [B*T, E], raw, float32 (padding
included: mask it). Gates stay float32 whatever the model's dtype.
"""

# mypy: disable-error-code="misc, untyped-decorator"
# transformers carries no types: its classes and decorators are Any to mypy.

import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import (
    OlmoeAttention,
    OlmoeForCausalLM,
    OlmoeModel,
    OlmoePreTrainedModel,
    OlmoeRMSNorm,
    OlmoeRotaryEmbedding,
    OlmoeTopKRouter,
    load_balancing_loss_func,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from selectmoe import allowed_code
from selectmoe.errors import UserError
from selectmoe.gates import (
    QualityGate,
    QualityScore,
    SelectMoeConfig,
    SelectMoeDecoderLayer,
    TrashExpert,
    TrashFunction,
    set_qk_norm,
)
from selectmoe.losses import quality_loss

__all__ = [
    "OriginalOlmoe",
    "QualityGate",
    "SelectMoeConfig",
    "SelectMoeForCausalLM",
    "SelectMoeModel",
    "SelectMoeOutput",
    "apply_gates",
    "load_judge",
    "open_gates",
    "realign",
]

logger = logging.getLogger(__name__)

OPEN_BIAS = 100.0
"""A bias at which sigmoid is exactly 1 in every dtype."""


class SelectMoePreTrainedModel(OlmoePreTrainedModel):
    """What all Select-MoE models share: initialisation, recorded outputs, checkpointing."""

    config: SelectMoeConfig
    _no_split_modules: ClassVar[list[str]] = ["SelectMoeDecoderLayer"]
    _keep_in_fp32_modules_strict: ClassVar[set[str]] = {"quality_gate"}
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "router_logits": OutputRecorder(OlmoeTopKRouter, index=0),
        "quality_score": OutputRecorder(QualityScore, index=0),
        "hidden_states": SelectMoeDecoderLayer,
        "attentions": OlmoeAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, QualityGate):
            init.normal_(module.weight, mean=self.config.quality_gate_init_mean, std=self.config.quality_gate_init_std)
            init.constant_(module.bias, self.config.quality_gate_init_bias)
        else:
            super()._init_weights(module)

    def set_trash_expert(self, function: TrashFunction) -> None:
        """Give the model a custom trash expert: (hidden states [B, T, H], whether it trains) -> the same shape.

        What is saved says `custom` and names no code: whoever loads it gives the function again.
        """
        self.config.trash_expert_mode = "custom"
        for module in self.modules():
            if isinstance(module, TrashExpert):
                module.mode, module.function = "custom", function

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for `@use_experts_implementation` in this file; OlmoeExperts has it

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        """Always checkpoint without re-entering.

        The re-entrant kind runs the layers without a graph: what is recorded in them, gate scores and router logits,
        then has no gradient, silently. The other kind gives the same numbers as no checkpointing.
        """
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            logger.warning(
                "use_reentrant=True would cut the gates' gradient: checkpointing without re-entering instead"
            )
        function = functools.partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, function, every_n_layers)


class SelectMoeModel(SelectMoePreTrainedModel, OlmoeModel):
    """The base model: final hidden states and, asked for `output_router_logits`, scores and router logits per layer."""

    def __init__(self, config: SelectMoeConfig) -> None:
        """Build the model with fresh weights."""
        super(OlmoeModel, self).__init__(config)  # not OlmoeModel's own, which would build OLMoE's layers first
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([SelectMoeDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = OlmoeRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = OlmoeRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MoeModelOutputWithPast:
        """As `OlmoeModel.forward`, no lm_head.

        Returns:
            `last_hidden_state` [B, T, H]; with `output_router_logits` also, per layer, `quality_score` [B, T, 1] and
            `moe_logits` [B*T, E], raw, float32.
        """
        record = self.config.output_router_logits if output_router_logits is None else output_router_logits
        kwargs |= {"output_router_logits": record, "output_quality_score": record, "return_dict": True}
        kwargs |= {"inputs_embeds": inputs_embeds, "use_cache": use_cache}
        outputs: MoeModelOutputWithPast = super().forward(
            input_ids, attention_mask, position_ids, past_key_values, **kwargs
        )
        if record:
            outputs["moe_logits"] = tuple(logits.float() for logits in outputs.router_logits)
        return outputs


@dataclass
class SelectMoeOutput(MoeCausalLMOutputWithPast):
    """OLMoE's output plus the gates'.

    Attributes:
        ce_loss: the cross-entropy alone.
        quality_loss: L_q, unweighted.
        quality_score: per layer [B, T, 1], raw, float32.
        moe_logits: per layer [B*T, E], raw, float32.
    """

    ce_loss: Tensor | None = None
    quality_loss: Tensor | None = None
    quality_score: tuple[Tensor, ...] | None = None
    moe_logits: tuple[Tensor, ...] | None = None


class SelectMoeForCausalLM(SelectMoePreTrainedModel, OlmoeForCausalLM):
    """The language model with its quality gates and their losses."""

    def __init__(self, config: SelectMoeConfig) -> None:
        """Build the model with fresh weights."""
        super(OlmoeForCausalLM, self).__init__(config)  # as above
        self.model = SelectMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        row_labels: Tensor | None = None,
        answer_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SelectMoeOutput:
        """As `OlmoeForCausalLM.forward`; with labels and `output_router_logits` the loss is that of `selectmoe.losses`.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 1 on valid tokens; 2-d where a loss is asked for.
            position_ids: as OLMoE's.
            past_key_values: as OLMoE's.
            inputs_embeds: as OLMoE's.
            labels: [B, T], -100 is not learned. `num_items_in_batch` (learned tokens of the global step) normalises;
                `shift_labels` replaces labels that are not yet aligned.
            use_cache: as OLMoE's.
            output_router_logits: also give scores and router logits, and add their losses.
            logits_to_keep: as OLMoE's.
            row_labels: [B], 1 for pool rows, 0 for corrupted copies (never learned by the cross-entropy).
            answer_mask: [B, T], 1 on answer tokens.
            **kwargs: handed on to the base model.

        Raises:
            UserError: the configured quality loss is unknown or lacks its arguments.
        """
        record = self.config.output_router_logits if output_router_logits is None else output_router_logits
        items, shifted = kwargs.pop("num_items_in_batch", None), kwargs.pop("shift_labels", None)
        base = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=record,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(base.last_hidden_state, logits_to_keep))
        out = SelectMoeOutput(
            logits=logits,
            past_key_values=base.past_key_values,
            hidden_states=base.hidden_states,
            attentions=base.attentions,
            router_logits=base.router_logits,
            quality_score=base.get("quality_score"),
            moe_logits=base.get("moe_logits"),
        )
        if labels is not None:
            out.ce_loss = out.loss = self._cross_entropy(logits, labels, shifted, row_labels, items)
        if record:
            valid = None  # of these tokens: the mask also covers what a cache holds
            if attention_mask is not None and attention_mask.dim() == 2:
                valid = attention_mask[:, -base.last_hidden_state.shape[1] :]
            out.aux_loss = load_balancing_loss_func(
                out.moe_logits, self.config.num_experts, self.config.num_experts_per_tok, valid
            )
            if out.loss is not None:
                if valid is None:
                    valid = base.last_hidden_state.new_ones(base.last_hidden_state.shape[:2])
                out.loss = out.loss + self._router_losses(out, valid, row_labels, answer_mask).to(out.loss.device)
        return out

    def _cross_entropy(
        self, logits: Tensor, labels: Tensor, shifted: Tensor | None, row_labels: Tensor | None, items: Any
    ) -> Tensor:
        """Next-token cross-entropy over the learned tokens of clean rows; zero where there is none.

        `shifted` [B, T], aligned with the logits already, takes the place of `labels` where the text is split over devices.
        """
        if shifted is None:
            shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        if row_labels is not None:
            shifted = shifted.masked_fill((row_labels == 0).to(shifted.device)[:, None], -100)
        if items is None:
            items = (shifted != -100).sum().clamp(min=1)
        loss: Tensor = self.loss_function(
            logits, None, self.vocab_size, num_items_in_batch=items, shift_labels=shifted.contiguous()
        )
        return loss

    def _router_losses(
        self, out: SelectMoeOutput, valid: Tensor, row_labels: Tensor | None, answer_mask: Tensor | None
    ) -> Tensor:
        """Coef * ([enable_load_balancing] L_lb + quality_loss_weight L_q); notes L_q in `out`."""
        config = self.config
        out.quality_loss = quality_loss(
            config.quality_loss_type,
            out.quality_score or (),
            valid,
            config.quality_loss_params,
            row_labels,
            answer_mask,
        )
        total = config.quality_loss_weight * out.quality_loss
        if config.enable_load_balancing:
            total = total + out.aux_loss
        scaled: Tensor = config.router_aux_loss_coef * total
        return scaled


class OriginalOlmoe(OlmoeForCausalLM):
    """OLMoE itself, with the one liberty of `qk_norm: false` in its config (what `upcycle` makes of a Llama-like model)."""

    def __init__(self, config: OlmoeConfig) -> None:
        """Build the model with fresh weights."""
        super().__init__(config)
        for layer in self.model.layers:
            set_qk_norm(layer.self_attn, config)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # else it would silently run other experts kernels than OLMoE and Select-MoE


AutoConfig.register("select_moe", SelectMoeConfig)
AutoModel.register(SelectMoeConfig, SelectMoeModel)
AutoModelForCausalLM.register(SelectMoeConfig, SelectMoeForCausalLM)
# On disk the experts keep OLMoE's per-expert layout, in memory they are fused.
register_checkpoint_conversion_mapping("select_moe", get_checkpoint_conversion_mapping("qwen2_moe"), overwrite=True)


def realign(model: nn.Module) -> None:
    """Copy every parameter into memory of its own, in place.

    Weights that are mapped from a file lie wherever the file has them, and matrix kernels round differently by
    alignment: without this the same weights give other bits when the file holds one more tensor.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def open_gates(model: SelectMoeForCausalLM) -> None:
    """Set every gate to g = 1 exactly, at which an applied gate changes nothing."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, QualityGate):
                module.weight.zero_()
                module.bias.fill_(OPEN_BIAS)


def apply_gates(model: SelectMoeForCausalLM, gain: float, bias: float) -> None:
    """Turn a trained observer into a model with applied gates, g = sigmoid(gain * s + bias), in place.

    The bias that the gates began with plays no part once they are trained: `contrastive`, with as many rows as copies,
    brings the mean score to about 0 from wherever it was (docs/conversion.md).

    Args:
        model: with gates in observer mode.
        gain: what scores are multiplied by; small, because scores that order rows may be large.
        bias: what is then added: the larger, the more of the MoE's output stays.

    Raises:
        UserError: the gates are applied already.
    """
    if model.config.gate_mode != "observer":
        raise UserError(f"gate_mode is {model.config.gate_mode} already: only observers are turned into applied gates")
    model.config.gate_mode = "applied"
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SelectMoeDecoderLayer):
                module.gate_mode = "applied"
                module.quality_gate.weight.mul_(gain)
                module.quality_gate.bias.mul_(gain).add_(bias)


def load_judge(
    path: str | Path, device: torch.device | str, dtype: torch.dtype, trash_expert: str = ""
) -> SelectMoeForCausalLM:
    """A Select-MoE checkpoint in eval mode; its gates are float32 whatever the dtype.

    Args:
        path: a folder, `s3://` or a hub name.
        device: where it goes.
        dtype: of everything but the gates.
        trash_expert: import path of a custom trash expert, which the command line must have allowed; "": the
            checkpoint's own.

    Raises:
        UserError: there is no checkpoint at `path`, it is not a Select-MoE one, or its trash expert is custom and none
            is given, or one is given and would not be used.
    """
    from selectmoe.checkpoint import resolve

    function = allowed_code.get(trash_expert, "selector_model.trash_expert") if trash_expert else None
    source = resolve(str(path), ("select_moe",), "selector_model.path", "make one with `selectmoe convert`")
    if function is None and source.config.get("trash_expert_mode") == "custom":
        raise UserError(f"{source.path} has a custom trash expert: name it with selector_model.trash_expert=")
    if function is not None and source.config.get("gate_mode") != "applied":
        raise UserError("selector_model.trash_expert is read with gate_mode=applied only: leave it out")
    model: SelectMoeForCausalLM = SelectMoeForCausalLM.from_pretrained(source.path, dtype=dtype).to(device)
    if function is not None:
        model.set_trash_expert(function)
    realign(model)
    model.eval()
    return model
