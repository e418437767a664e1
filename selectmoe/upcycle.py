"""Make an OLMoE-shaped checkpoint of a dense Llama-like one (sparse upcycling, https://arxiv.org/abs/2212.05055).

    selectmoe upcycle source_model=HuggingFaceTB/SmolLM2-135M data=out/ingest experts=4 output_dir=out/upcycle

In: a dense checkpoint (SmolLM2, Llama, Mistral, Qwen2, Qwen2.5, Qwen3) and a pool. Out: an `olmoe` checkpoint with
`qk_norm: false` (Qwen3: `head`), every expert a copy of the dense MLP, so that its logits are the dense model's (rounding
apart) as long as the top-k weights sum to 1. The routers are initialised
from the data: in every layer the centres of a spherical k-means over the hidden states that the MLP reads. Such a router
spreads a pool over the experts by content, where a random one gives random projections as features.

Identical experts give a router no gradient. Whoever trains routers (`recipe=legacy`) sets `expert_noise` (0.1 was enough in
a trial), at the price of exactness.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selectmoe import checkpoint, pool, stage
from selectmoe.config import StageConfig, identity, input_
from selectmoe.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

STAGE = "upcycle"
VERSION = 2
COMMON: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "max_position_embeddings": 131072,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "use_sliding_window": True,
    },
    "qwen2": {"max_position_embeddings": 32768, "attention_bias": True, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32768, "head_dim": 128, "qk_norm": "head", "sliding_window": 4096},
}
"""What a config.json of that kind means by what it does not say, where OLMoE would mean something else."""
DENSE = tuple(DEFAULTS)
INITS = ("clusters", "random")
TOKENS_PER_BATCH = 2048
ENTROPY_SHARE = 0.5
"""Mean entropy of a fresh router's softmax, as a share of log(experts): decided, but not one-hot."""


@dataclass
class UpcycleConfig(StageConfig):
    """Configuration of `upcycle`."""

    source_model: str = input_(doc="dense Llama-like checkpoint: a folder, or a hub name")
    data: str = input_(doc="the pool from which the routers are initialised, or ingest's output_dir")
    experts: int = identity(4, doc="copies of the MLP per layer")
    top_k: int = identity(1, doc="experts per token; 1 runs at the dense model's speed")
    layers: int = identity(0, doc="keep the first so many layers; 0: all (fewer are faster, and no longer exact)")
    init: str = identity("clusters", doc="the routers: clusters (of the pool's hidden states) or random")
    expert_noise: float = identity(0.0, doc="normal noise on the experts, in standard deviations of each weight matrix")
    rows: int = identity(64, doc="rows of the pool that init=clusters reads")
    max_length: int = identity(256, doc="tokens of such a row")

    def validate(self) -> None:
        """Check sizes and names.

        Raises:
            UserError: a value is out of its range.
        """
        if self.experts < 2 or not 1 <= self.top_k <= self.experts:
            raise UserError(f"experts={self.experts} must be at least 2, and top_k={self.top_k} between 1 and experts")
        if self.init not in INITS:
            raise UserError(f"init={self.init!r} is unknown; known: {', '.join(INITS)}")
        for name in ("rows", "max_length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: at least 1")
        if self.layers < 0:
            raise UserError(f"layers={self.layers}: 0 (all) or more")
        if not 0 <= self.expert_noise < 10:
            raise UserError(f"expert_noise={self.expert_noise} must be at least 0 and below 10 (0.1 is much already)")


def run(config: UpcycleConfig) -> Path:
    """Upcycle a checkpoint.

    Returns:
        The output directory.

    Raises:
        UserError: the source is not there, not Llama-like, or has what OLMoE has not (biases in its MLP).
    """
    config.validate()
    source = checkpoint.resolve(config.source_model, DENSE, "source_model", "only Llama-like models can be upcycled")
    sparse = olmoe_config(source.config, config)
    rows = str(pool.locate(config.data))
    with stage.begin(STAGE, VERSION, config, inputs={"source_model": str(source.path), "data": rows}) as out:
        if out.done:
            return out.path
        routers = initial_routers(source, sparse, config)
        checkpoint.write_tensors(out.staging, sparse_tensors(source.path, sparse, routers, config))
        checkpoint.write_json(out.staging / "config.json", sparse)
        checkpoint.copy_companions(source.path, out.staging)
        out.commit()
    return out.path


def olmoe_config(given: dict[str, Any], config: UpcycleConfig) -> dict[str, Any]:
    """The `config.json` of the OLMoE-shaped model.

    Args:
        given: the dense model's.
        config: of this stage.

    Raises:
        UserError: the dense model has what OLMoE has not, or its config does not say how large it is.
    """
    for key in ("num_attention_heads", "hidden_size", "num_hidden_layers"):
        if not isinstance(given.get(key), int):
            raise UserError(f"source_model: its config.json has no {key}: expected that of a whole checkpoint")
    dense: dict[str, Any] = (
        COMMON | {"qk_norm": False, "attention_bias": False} | DEFAULTS.get(given.get("model_type", ""), {}) | given
    )
    if dense.get("mlp_bias"):
        raise UserError("source_model has biases in its MLP, which OLMoE has not")
    if config.layers > dense["num_hidden_layers"]:
        raise UserError(f"layers={config.layers}: source_model has {dense['num_hidden_layers']}")
    kept = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "rms_norm_eps",
        "max_position_embeddings",
        "initializer_range",
        "rope_parameters",
        "rope_theta",
        "rope_scaling",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "attention_dropout",
        "attention_bias",
        "qk_norm",
        "dtype",
        "torch_dtype",
    ]
    sparse = {key: dense[key] for key in kept if key in dense}
    if dense.get("head_dim") not in (None, dense["hidden_size"] // dense["num_attention_heads"]):
        sparse["head_dim"] = dense["head_dim"]
    if dense.get("use_sliding_window") and (window := dense.get("sliding_window")):
        sparse["max_position_embeddings"] = min(window, dense["max_position_embeddings"])  # up to there it is exact
    return sparse | {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "num_hidden_layers": config.layers or dense["num_hidden_layers"],
        "num_experts": config.experts,
        "num_experts_per_tok": config.top_k,
        "norm_topk_prob": True,
        "clip_qkv": None,
        "router_aux_loss_coef": 0.01,
    }


def sparse_tensors(
    path: Path, sparse: dict[str, Any], routers: list[Tensor], config: UpcycleConfig
) -> Iterator[tuple[str, Tensor]]:
    """The sparse model's tensors in the per-expert layout, in the order of the source, router beside its experts."""
    layers = int(sparse["num_hidden_layers"])
    done: set[int] = set()
    there = checkpoint.tensor_places(path)
    for name, tensor in checkpoint.read_tensors(path):
        parts = name.split(".")
        layer = int(parts[2]) if name.startswith("model.layers.") else -1
        if layer >= layers:
            continue
        if len(parts) > 3 and parts[3] == "mlp":
            for expert in range(config.experts):
                copy = ".".join([*parts[:4], "experts", str(expert), *parts[4:]])
                yield copy, noisy(tensor, copy, config)
            if layer not in done:
                done.add(layer)
                yield f"model.layers.{layer}.mlp.gate.weight", routers[layer].to(tensor.dtype)
        else:
            yield name, tensor
        bias = name.removesuffix("weight") + "bias"
        if name.endswith("o_proj.weight") and sparse["attention_bias"] and bias not in there:
            yield bias, tensor.new_zeros(tensor.shape[0])  # Qwen2 has biases on q, k and v only; OLMoE has all or none


def noisy(tensor: Tensor, name: str, config: UpcycleConfig) -> Tensor:
    """A copy of a weight, with the configured noise; the noise follows from seed and name, not from what came before."""
    import hashlib

    import torch

    if not config.expert_noise:
        return tensor.clone()
    digest = hashlib.sha256(f"{config.seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    wide = tensor.float()
    noise = torch.randn(wide.shape, generator=generator) * wide.std(correction=0) * config.expert_noise
    return (wide + noise).to(tensor.dtype)


def initial_routers(source: checkpoint.Source, sparse: dict[str, Any], config: UpcycleConfig) -> list[Tensor]:
    """A router [E, H] per layer."""
    import torch

    shape = (config.experts, int(sparse["hidden_size"]))
    layers = int(sparse["num_hidden_layers"])
    if config.init == "random":
        generator = torch.Generator().manual_seed(config.seed)
        return [torch.randn(shape, generator=generator) * float(sparse["initializer_range"]) for _ in range(layers)]
    states = hidden_states(source, layers, config)
    return [torch.from_numpy(router(h, config.experts, config.seed + n)) for n, h in enumerate(states)]


def hidden_states(source: checkpoint.Source, layers: int, config: UpcycleConfig) -> Iterator[npt.NDArray[np.float32]]:
    """What each layer's MLP reads on the pool's first rows by a hash of their ids: [tokens, H], layer by layer.

    Raises:
        UserError: the pool has no row.
    """
    import hashlib

    import torch
    from transformers import AutoModelForCausalLM

    from selectmoe import template
    from selectmoe.device import pick_device, set_threads
    from selectmoe.progress import progress

    set_threads(config.threads)
    device = pick_device()
    rows = pool.read_pool(pool.locate(config.data))
    rows.sort(key=lambda row: hashlib.sha256(f"{config.seed}:{row.dataset}:{row.id}".encode()).digest())
    tokenizer = template.load_tokenizer(source.path)
    encoded = template.encode_many(rows[: config.rows], tokenizer, config.max_length)
    if not encoded:
        raise UserError(f"data={config.data} holds no row to initialise the routers from")
    encoded.sort(key=lambda e: (-len(e), e.input_ids))
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).to(device).eval()
    model.model.layers = model.model.layers[:layers]
    caught: list[Tensor] = []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_hook(lambda _m, _i, output: caught.append(output))
    found: list[list[Tensor]] = [[] for _ in range(layers)]
    size = max(1, TOKENS_PER_BATCH // len(encoded[0]))
    batches = [encoded[i : i + size] for i in range(0, len(encoded), size)]
    for batch in progress(batches, "hidden states", unit="batch"):
        width = len(batch[0])
        ids = torch.tensor([e.input_ids + [0] * (width - len(e)) for e in batch], device=device)
        mask = torch.tensor([[1] * len(e) + [0] * (width - len(e)) for e in batch], device=device)
        caught.clear()
        with torch.inference_mode():
            model.model(input_ids=ids, attention_mask=mask, use_cache=False)
        for layer, output in enumerate(caught):
            found[layer].append(output[mask.bool()].float().cpu())
    del model
    while found:  # a layer's states are freed once its router is made
        yield torch.cat(found.pop(0)).numpy()


def router(states: npt.NDArray[np.float32], experts: int, seed: int) -> npt.NDArray[np.float32]:
    """A router [E, H] from hidden states [tokens, H]: cluster centres, scaled.

    Hidden states share a large mean, which would send every token to the same expert; a router has no bias to take it
    away, so the centres are made of centred states and then freed of their part along the mean. The scale is the one at
    which the softmax has `ENTROPY_SHARE` of the largest entropy on average.

    Raises:
        UserError: there are fewer tokens than experts.
    """
    import numpy as np

    from selectmoe.kmeans import spherical_kmeans

    if len(states) < experts:
        raise UserError(f"{len(states)} tokens cannot initialise {experts} experts: give more rows")
    mean = states.mean(axis=0, dtype=np.float64)
    centred = (states - mean).astype(np.float32)
    centres = np.asarray(spherical_kmeans(centred, experts, seed, restarts=2).centres, dtype=np.float64)
    along = mean / max(float(np.linalg.norm(mean)), 1e-12)
    centres -= np.outer(centres @ along, along)
    logits = states.astype(np.float64) @ centres.T

    def entropy(scale: float) -> float:
        z = logits * scale
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        return float(-(p * np.log(np.maximum(p, 1e-300))).sum(axis=1).mean())

    low, high = 0.0, 1e3
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if entropy(middle) > ENTROPY_SHARE * np.log(experts) else (low, middle)
    return (centres * high).astype(np.float32)
