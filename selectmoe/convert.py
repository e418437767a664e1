"""Turn an OLMoE checkpoint into a Select-MoE checkpoint: every original tensor unchanged, quality gates added.

    selectmoe convert source_model=allenai/OLMoE-1B-7B-0125 output_dir=out/convert

In: a folder or hub name of an OLMoE checkpoint, in the original layout (one tensor per expert) or with fused experts.
Out: the same tensors, bits and dtype, plus `model.layers.N.quality_gate.{weight [1, H], bias [1]}` in float32; the
config as `select_moe`; tokenizer and generation config byte for byte. Tensors stream: one shard and a bit in memory.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selectmoe import checkpoint, stage
from selectmoe.config import StageConfig, group, identity, input_
from selectmoe.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

STAGE = "convert"
VERSION = 1
DTYPES = ("keep", "float32", "bfloat16", "float16")


@dataclass
class GateOptions:
    """Config keys of the Select-MoE model (docs: the model)."""

    quality_gate_init_mean: float = identity(0.0, doc="mean of the gates' initial weights")
    quality_gate_init_std: float = identity(0.02, doc="standard deviation of the gates' initial weights")
    quality_gate_init_bias: float | None = identity(
        None, doc="initial bias; default 0 for observers, +3 for applied gates"
    )
    gate_mode: str = identity("observer", doc="observer: the gate only reads; applied: it scales the MoE's output")
    trash_expert_mode: str = identity("zero", doc="what replaces the MoE where an applied gate closes: zero, noise")
    quality_loss_type: str = identity(
        "sigmoid", doc="quality loss in the checkpoint's config; warmup's recipe decides its own"
    )
    quality_loss_weight: float = identity(1.0, doc="weight of the quality loss, before router_aux_loss_coef")
    enable_load_balancing: bool = identity(False, doc="add the load-balancing loss when training")


@dataclass
class ConvertConfig(StageConfig):
    """Configuration of `convert`."""

    source_model: str = input_(doc="OLMoE checkpoint: a folder, or a hub name like allenai/OLMoE-1B-7B-0125")
    dtype: str = identity("keep", doc="dtype of the original tensors: keep (bit for bit), float32, bfloat16, float16")
    model: GateOptions = group(GateOptions)

    def validate(self) -> None:
        """Refuse an unknown dtype or a negative spread; the model's own names are checked by its config.

        Raises:
            UserError: a value is out of its range.
        """
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype} is unknown; known: {', '.join(DTYPES)}")
        if self.model.quality_gate_init_std < 0:
            raise UserError(f"model.quality_gate_init_std={self.model.quality_gate_init_std} must not be negative")


def run(config: ConvertConfig) -> Path:
    """Convert a checkpoint.

    Returns:
        The output directory.

    Raises:
        UserError: the source is not there or not OLMoE, an option is unknown, or `output_dir` holds something else.
    """
    config.validate()
    source = checkpoint.resolve(config.source_model, ("olmoe",), "source_model", "only OLMoE models can be converted")
    converted = select_moe_config(source.config, config)
    with stage.begin(STAGE, VERSION, config, inputs={"source_model": str(source.path)}) as out:
        if out.done:
            return out.path
        checkpoint.write_tensors(out.staging, tensors(source, converted, config))
        checkpoint.write_json(out.staging / "config.json", converted)
        names = checkpoint.copy_companions(source.path, out.staging)
        if not set(names) & set(checkpoint.TOKENIZER_FILES):
            print(f"{source.path} has no tokenizer: none is written", file=sys.stderr)
        out.commit()
    return out.path


def select_moe_config(original: dict[str, Any], config: ConvertConfig) -> dict[str, Any]:
    """The original's `config.json` as a Select-MoE one.

    Raises:
        UserError: transformers or Select-MoE refuses a value.
    """
    from huggingface_hub.errors import StrictDataclassError

    from selectmoe.modeling import SelectMoeConfig

    options = {name: value for name, value in asdict(config.model).items() if value is not None}
    converted = original | options | {"model_type": "select_moe", "architectures": ["SelectMoeForCausalLM"]}
    if config.dtype != "keep":
        converted.pop("torch_dtype", None)
        converted["dtype"] = config.dtype
    try:
        loaded = SelectMoeConfig(**{k: v for k, v in converted.items() if k != "model_type"})
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UserError(
            f"source_model={config.source_model}: config.json is refused: {str(error).splitlines()[0]}"
        ) from None
    converted["quality_gate_init_bias"] = loaded.quality_gate_init_bias
    converted["qk_norm"] = loaded.qk_norm
    return converted


def tensors(
    source: checkpoint.Source, converted: dict[str, Any], config: ConvertConfig
) -> Iterator[tuple[str, Tensor]]:
    """The original's tensors, then the gates, layer by layer."""
    import torch

    dtype = None if config.dtype == "keep" else getattr(torch, config.dtype)
    for name, tensor in checkpoint.read_tensors(source.path):
        yield name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    for layer in range(int(converted["num_hidden_layers"])):
        weight, bias = initial_gate(layer, converted, config.seed)
        yield gate_name(layer, "weight"), weight
        yield gate_name(layer, "bias"), bias


def gate_name(layer: int, kind: str) -> str:
    """Name of a quality gate's `weight` or `bias`."""
    return f"model.layers.{layer}.quality_gate.{kind}"


def initial_gate(layer: int, options: dict[str, Any], seed: int) -> tuple[Tensor, Tensor]:
    """Fresh weight [1, H] and bias [1] of one gate, float32, from the seed and the layer's number alone."""
    import torch

    digest = hashlib.sha256(f"quality_gate:{seed}:{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    weight = torch.randn((1, int(options["hidden_size"])), generator=generator)
    weight = weight * options["quality_gate_init_std"] + options["quality_gate_init_mean"]
    return weight, torch.full((1,), float(options["quality_gate_init_bias"]))
