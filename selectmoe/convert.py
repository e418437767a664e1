"""Turn an OLMoE checkpoint into a Select-MoE checkpoint: every original tensor unchanged, quality gates added.

    selectmoe convert source_model=allenai/OLMoE-1B-7B-0125 output_dir=out/convert
    selectmoe convert source_model=s3://models/olmoe output_dir=s3://models/select-moe
    selectmoe convert source_model=out/convert apply.weights=out/warmup apply.gain=0.3 output_dir=out/applied

In: an OLMoE checkpoint (a folder, on S3 or the hub), in the original layout (one tensor per expert) or with fused
experts. Out: shards of the same names with the same tensors, bits and dtype; in the last one also
`model.layers.N.quality_gate.{weight [1, H], bias [1]}`, float32; the config as `select_moe`; tokenizer, generation config
and licence byte for byte. Bytes stream from file to file, so memory does not grow with the model. A shard that is
written is not written again after a kill; with `output_dir=s3://...` it is sent at once, and the disk holds one at a time.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selectmoe import cache, checkpoint, shards, stage
from selectmoe.config import StageConfig, group, identity, input_
from selectmoe.errors import Unavailable, UserError
from selectmoe.progress import progress
from selectmoe.shards import Planned, Stored

if TYPE_CHECKING:
    from torch import Tensor

STAGE = "convert"
VERSION = 3
DTYPES = ("keep", "float32", "bfloat16", "float16")


@dataclass
class GateOptions:
    """Config keys of the Select-MoE model (docs: the model)."""

    quality_gate_init_mean: float = identity(0.0, doc="mean of the gates' initial weights")
    quality_gate_init_std: float = identity(0.02, doc="standard deviation of the gates' initial weights")
    quality_gate_init_bias: float = identity(3.0, doc="initial bias of the gates: a fresh one says 0.95 of every token")
    gate_mode: str = identity("observer", doc="observer: the gate only reads; applied: it scales the MoE's output")
    trash_expert_mode: str = identity("zero", doc="where an applied gate closes: zero, noise, custom (named at use)")
    quality_loss_type: str = identity(
        "sigmoid", doc="quality loss in the checkpoint's config; warmup's recipe decides its own"
    )
    quality_loss_weight: float = identity(1.0, doc="weight of the quality loss, before router_aux_loss_coef")
    enable_load_balancing: bool = identity(False, doc="add the load-balancing loss when training")


@dataclass
class ApplyOptions:
    """Turn the observers of a Select-MoE checkpoint into applied gates: g = sigmoid(gain * s + bias)."""

    gain: float | None = identity(
        None, doc="give it to do so (0.3): what scores are multiplied by; source_model is then a Select-MoE checkpoint"
    )
    bias: float = identity(3.0, doc="what is then added: the larger, the more of the MoE's output stays")
    weights: str = input_("", doc="trained gates: warmup's output or its file; default: those in the checkpoint")


@dataclass
class ConvertConfig(StageConfig):
    """Configuration of `convert`."""

    source_model: str = input_(
        doc="OLMoE checkpoint: a folder, s3://bucket/prefix, or a hub name like allenai/OLMoE-1B-7B-0125"
    )
    dtype: str = identity("keep", doc="dtype of the original tensors: keep (bit for bit), float32, bfloat16, float16")
    model: GateOptions = group(GateOptions)
    apply: ApplyOptions = group(ApplyOptions)

    def validate(self) -> None:
        """Refuse what is unknown, negative or would not be read; the model's own names are checked by its config.

        Raises:
            UserError: a value is out of its range.
        """
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype} is unknown; known: {', '.join(DTYPES)}")
        if self.model.quality_gate_init_std < 0:
            raise UserError(f"model.quality_gate_init_std={self.model.quality_gate_init_std} must not be negative")
        self._check_apply()

    def _check_apply(self) -> None:
        if self.apply.gain is None:
            if self.apply.weights or self.apply.bias != ApplyOptions().bias:
                raise UserError(
                    "apply.weights and apply.bias are read with apply.gain only: give it, or leave them out"
                )
            return
        if not self.apply.gain > 0 or self.apply.gain == float("inf"):
            raise UserError(f"apply.gain={self.apply.gain} must be above 0: it keeps the order of the scores")
        if replace(self.model, trash_expert_mode=GateOptions().trash_expert_mode) != GateOptions():
            raise UserError("with apply.gain only model.trash_expert_mode is read: the gates are there already")


def run(config: ConvertConfig) -> Path | str:
    """Convert a checkpoint.

    Returns:
        The output directory; the URI where it is one.

    Raises:
        UserError: the source is not there, not OLMoE or not whole, an option is unknown, or `output_dir` holds something
            else.
        Unavailable: the disk is full.
    """
    config.validate()
    applying = config.apply.gain is not None
    kind, advice = "olmoe", "only OLMoE models can be converted"
    if applying:
        kind, advice = "select_moe", "apply.gain is for what `convert` made of one"
    source = checkpoint.resolve(config.source_model, (kind,), "source_model", advice)
    converted = applied_config(source, config) if applying else select_moe_config(source.config, config)
    stored = source.tensors()
    check_tensors(source, stored, f"source_model={config.source_model}", gates=applying)
    gates = applied_gates(source, stored, config) if applying else fresh_gates(converted, config.seed)
    inputs = {"source_model": str(source.path), "weights": config.apply.weights}
    with stage.begin(STAGE, VERSION, config, inputs=inputs, resume=True) as out:
        if not out.done:
            plan = planned_shards(source, stored, gates, config.dtype)
            _require_space(plan, out)
            for name in progress(plan, "convert", unit="shard"):
                if not out.has(name):
                    shards.write(out.staging / f"{name}.part", plan[name])
                    out.keep(name)
            if (source.path / checkpoint.INDEX).is_file():
                checkpoint.write_json(out.staging / checkpoint.INDEX, index(plan))
            checkpoint.write_json(out.staging / "config.json", converted)
            names = checkpoint.copy_companions(source.path, out.staging)
            if not set(names) & set(checkpoint.TOKENIZER_FILES):
                print(f"{source.path} has no tokenizer: none is written", file=sys.stderr)
            out.commit()
    return out.place if "://" in out.place else out.path


def select_moe_config(original: dict[str, Any], config: ConvertConfig) -> dict[str, Any]:
    """The original's `config.json` as a Select-MoE one.

    Raises:
        UserError: transformers or Select-MoE refuses a value.
    """
    from huggingface_hub.errors import StrictDataclassError

    from selectmoe.modeling import SelectMoeConfig

    converted = (
        original | asdict(config.model) | {"model_type": "select_moe", "architectures": ["SelectMoeForCausalLM"]}
    )
    if config.dtype != "keep":
        converted.pop("torch_dtype", None)
        converted["dtype"] = config.dtype
    try:
        loaded = SelectMoeConfig(**{k: v for k, v in converted.items() if k != "model_type"})
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UserError(
            f"source_model={config.source_model}: config.json is refused: {str(error).splitlines()[0]}"
        ) from None
    converted["qk_norm"] = loaded.qk_norm
    return converted


def applied_config(source: checkpoint.Source, config: ConvertConfig) -> dict[str, Any]:
    """The `config.json` of an observer's checkpoint with its gates applied.

    Raises:
        UserError: they are applied already.
    """
    if source.config.get("gate_mode") != "observer":
        raise UserError(f"source_model={config.source_model} has gate_mode={source.config.get('gate_mode')} already")
    options = {"gate_mode": "applied", "trash_expert_mode": config.model.trash_expert_mode}
    return source.config | options | ({} if config.dtype == "keep" else {"dtype": config.dtype})


def applied_gates(source: checkpoint.Source, stored: dict[str, Stored], config: ConvertConfig) -> dict[str, Tensor]:
    """The gates of an observer, trained ones where they are named, scaled and shifted; trained routers unchanged.

    Raises:
        UserError: the trained weights are none, or another model's.
    """
    import torch

    from selectmoe.router_weights import check_origin, read_router_weights

    found = {
        name: torch.frombuffer(bytearray().join(tensor.chunks()), dtype=torch.float32).reshape(tensor.shape)
        for name, tensor in stored.items()
        if ".quality_gate." in name
    }
    if config.apply.weights:
        place = str(cache.locate(config.apply.weights, "apply.weights")[0])
        check_origin(place, str(source.path))
        trained = read_router_weights(place)
        odd = sorted(found.keys() - trained.keys())
        odd += sorted(n for n, t in trained.items() if n not in stored or stored[n].shape != tuple(t.shape))
        if odd:
            raise UserError(f"apply.weights={config.apply.weights} does not fit source_model: see {odd[0]}")
        found |= trained
    assert config.apply.gain is not None
    for name, tensor in found.items():
        if ".quality_gate." in name:
            shift = config.apply.bias if name.endswith("bias") else 0.0
            found[name] = tensor.float() * config.apply.gain + shift
        else:  # a router, which was trained in float32
            kept = shards.FLOATS[stored[name].dtype]
            found[name] = tensor.to(getattr(torch, kept if config.dtype == "keep" else config.dtype))
    return found


def fresh_gates(converted: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Weight and bias of every layer's gate, as the config asks for them."""
    found: dict[str, Tensor] = {}
    for layer in range(int(converted["num_hidden_layers"])):
        found |= zip((gate_name(layer, "weight"), gate_name(layer, "bias")), initial_gate(layer, converted, seed))
    return found


def check_tensors(source: checkpoint.Source, stored: dict[str, Stored], where: str, gates: bool = False) -> None:
    """Prove from the shards' headers that they hold the model that the config describes.

    Args:
        source: the checkpoint.
        stored: its tensors.
        where: how the user named it, for messages.
        gates: whether there must be quality gates, or must not.

    Raises:
        UserError: a tensor is missing or has another shape, or the index lies.
    """
    expected = olmoe_shapes(source.config, fused="model.layers.0.mlp.experts.gate_up_proj" in stored)
    hidden, layers = int(source.config["hidden_size"]), range(int(source.config["num_hidden_layers"]))
    if gates:
        expected |= {gate_name(layer, "weight"): (1, hidden) for layer in layers}
        expected |= {gate_name(layer, "bias"): (1,) for layer in layers}
    if missing := sorted(set(expected) - set(stored)):
        raise UserError(
            f"{where} lacks {len(missing)} of the {len(expected)} tensors of its config, {missing[0]} first"
        )
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise UserError(f"{where}: {name} has shape {list(stored[name].shape)}, its config says {list(shape)}")
    if wrong := source.misplaced(stored):
        raise UserError(f"{where}: {checkpoint.INDEX} is wrong about {wrong[0]}: make it anew from the shards")
    if not gates and (there := sorted(name for name in stored if ".quality_gate." in name)):
        raise UserError(f"{where} holds {there[0]}: it was converted before")


def olmoe_shapes(config: dict[str, Any], fused: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that an OLMoE checkpoint must hold.

    Args:
        config: its `config.json`.
        fused: the experts of a layer in two tensors, not three per expert.
    """
    from transformers import OlmoeConfig

    c = OlmoeConfig(**{k: v for k, v in config.items() if k != "model_type"})
    hidden, inner, experts = c.hidden_size, c.intermediate_size, c.num_experts
    head = getattr(c, "head_dim", None) or hidden // c.num_attention_heads
    wide, narrow = head * c.num_attention_heads, head * c.num_key_value_heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, hidden)
    layer: dict[str, tuple[int, ...]] = {"mlp.gate.weight": (experts, hidden)}
    for name, size in (("q", wide), ("k", narrow), ("v", narrow), ("o", hidden)):
        layer[f"self_attn.{name}_proj.weight"] = (size, wide if name == "o" else hidden)
        if c.attention_bias:
            layer[f"self_attn.{name}_proj.bias"] = (size,)
    norm = config.get("qk_norm", True)
    if norm:
        sizes = (head, head) if norm == "head" else (hidden, narrow)
        layer |= {"self_attn.q_norm.weight": sizes[:1], "self_attn.k_norm.weight": sizes[1:]}
    layer |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    if fused:
        layer["mlp.experts.gate_up_proj"] = (experts, 2 * inner, hidden)
        layer["mlp.experts.down_proj"] = (experts, hidden, inner)
    for n in range(0 if fused else experts):
        up, down = (inner, hidden), (hidden, inner)
        layer |= {f"mlp.experts.{n}.{name}_proj.weight": up for name in ("gate", "up")}
        layer[f"mlp.experts.{n}.down_proj.weight"] = down
    for number in range(c.num_hidden_layers):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return shapes


def planned_shards(
    source: checkpoint.Source, stored: dict[str, Stored], gates: dict[str, Tensor], dtype: str
) -> dict[str, list[Planned]]:
    """What every shard of the result holds: that of the same name in the source; gates that are new, the last one.

    Args:
        source: the checkpoint.
        stored: its tensors.
        gates: tensors that are added, or take the place of the source's.
        dtype: of the source's tensors; keep: theirs.
    """
    plan: dict[str, list[Planned]] = {path.name: [] for path in source.shards}
    for name, tensor in stored.items():
        if name not in gates:
            plan[tensor.path.name].append(
                shards.copied(name, tensor) if dtype == "keep" else shards.cast(name, tensor, dtype)
            )
    for name, gate in gates.items():
        place = stored[name].path.name if name in stored else source.shards[-1].name
        plan[place].append(shards.given(name, gate))
    return {name: shards.aligned(tensors) for name, tensors in plan.items()}


def index(plan: dict[str, list[Planned]]) -> dict[str, Any]:
    """The content of `model.safetensors.index.json`."""
    weight_map = {tensor.name: name for name, tensors in plan.items() for tensor in tensors}
    total = sum(tensor.size for tensors in plan.values() for tensor in tensors)
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _require_space(plan: dict[str, list[Planned]], out: stage.Output) -> None:
    sizes = [shards.file_size(tensors) for name, tensors in plan.items() if not out.has(name)]
    needed = max(sizes, default=0) if "://" in out.place else sum(sizes)
    free = shutil.disk_usage(out.staging).free
    if needed > free:
        raise Unavailable(f"{out.staging} has {free / 1e9:.1f} GB left, the checkpoint takes {needed / 1e9:.1f} GB")


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
