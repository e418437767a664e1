"""The trained router parameters: quality gates and MoE routers, in the seed's file and in ours.

No command runs this module; `warmup` saves and `route` loads. `full_rank_weights.pt` is the seed's form: a dict with
`full_rank_weights` {name: tensor}, `mode`, `target_patterns`, `tokenizer_saved`; `full_rank_weights.safetensors` holds
the same tensors under our names. This is the only place that maps one to the other:

    model.layers.N.quality_gate.weight [1, H]   <->  model.layers.N.quality_gate.gate.weight
    model.layers.N.quality_gate.bias   [1]      <->  model.layers.N.quality_gate.gate.bias    (not in the seed's files)
    model.layers.N.mlp.gate.weight     [E, H]   <->  model.layers.N.normal_moe.gate.weight
"""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from selectmoe import cache
from selectmoe.checkpoint import METADATA
from selectmoe.errors import UserError
from selectmoe.judge_adapters import WEIGHTS as ADAPTER
from selectmoe.judge_adapters import load_adapters
from selectmoe.manifest import NAME as MANIFEST
from selectmoe.manifest import read_manifest

LEGACY = "full_rank_weights.pt"
NATIVE = "full_rank_weights.safetensors"
TARGET_PATTERNS = ["quality_gate", ".gate.weight", "router"]
UNREADABLE = (
    *(SafetensorError, pickle.UnpicklingError, struct.error, EOFError, OSError),
    *(LookupError, TypeError, ValueError, AttributeError, RuntimeError),
)
"""What a file that is no file of weights raises."""

OURS = re.compile(r"model\.layers\.\d+\.(quality_gate\.(weight|bias)|mlp\.gate\.weight)")


def to_seed(name: str) -> str:
    """Our parameter name in the seed's words."""
    return name.replace(".quality_gate.", ".quality_gate.gate.").replace(".mlp.gate.", ".normal_moe.gate.")


def from_seed(name: str) -> str:
    """The seed's parameter name in ours; a name that is ours already stays."""
    return name.replace(".quality_gate.gate.", ".quality_gate.").replace(".normal_moe.gate.", ".mlp.gate.")


def router_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The quality gates' and routers' parameters by our name: L (H + 1 + E H) numbers."""
    return {name: p for name, p in model.named_parameters() if OURS.fullmatch(name)}


def save_router_weights(model: nn.Module, directory: Path, tokenizer: Any = None) -> None:
    """Write both files, and the tokenizer beside them where one is given.

    Args:
        model: a `SelectMoeForCausalLM`.
        directory: an existing folder.
        tokenizer: a transformers tokenizer, or None.
    """
    ours = {name: p.detach().cpu().contiguous().clone() for name, p in router_parameters(model).items()}
    _write(directory / NATIVE, save(ours, metadata=METADATA))
    buffer = io.BytesIO()  # torch.save's bytes depend on the file name: none is known here
    payload = {
        "full_rank_weights": {to_seed(name): tensor for name, tensor in ours.items()},
        "mode": "parameter",
        "target_patterns": TARGET_PATTERNS,
        "tokenizer_saved": tokenizer is not None,
    }
    torch.save(payload, buffer)
    _write(directory / LEGACY, buffer.getvalue())
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def read_router_weights(path: Path | str) -> dict[str, Tensor]:
    """The tensors of a file of either form, or of its folder, under our names.

    Raises:
        UserError: there is no such file, it cannot be read, or it holds no router weights.
    """
    path = Path(path)
    file = path
    if path.is_dir():
        file = next((path / name for name in (NATIVE, LEGACY) if (path / name).is_file()), path / LEGACY)
    if not file.is_file():
        raise UserError(f"router weights {file} do not exist; expected {LEGACY} or {NATIVE} from `selectmoe warmup`")
    try:
        if file.suffix == ".safetensors":
            tensors = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)["full_rank_weights"]
    except UNREADABLE as error:
        raise UserError(f"{file} cannot be read as router weights: {_first_line(error)}") from None
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{file} holds no router weights")
    return {from_seed(str(name)): tensor for name, tensor in tensors.items()}


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def adapter_folder(path: Path | str) -> Path | None:
    """The folder of LoRA adapters that a path names, by itself or by their file; None where it names something else."""
    folder = Path(path).parent if Path(path).name == ADAPTER else Path(path)
    whole = any((folder / name).is_file() for name in (NATIVE, LEGACY))
    return folder if (folder / ADAPTER).is_file() and (folder != Path(path) or not whole) else None


def check_origin(path: Path | str, model: str) -> None:
    """Refuse what `warmup` trained on another checkpoint than this one, by its manifest (a file of the seed has none).

    Args:
        path: as for `load_router_weights`.
        model: the checkpoint that it is to go into.

    Raises:
        UserError: it was trained on another one.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if not (folder / MANIFEST).is_file():
        return
    trained_on = read_manifest(folder, verify=False).inputs.get("selector_model")
    if trained_on and trained_on["identity"] != (found := cache.identity_of(model)):
        raise UserError(
            f"{path} was trained on another model: {trained_on['uri']} (identity {trained_on['identity'][:12]}), not on "
            f"{model} ({found[:12]})"
        )


def load_router_weights(model: nn.Module, path: Path | str) -> None:
    """Put trained router parameters into a model, in the dtype in which they were saved; adapters are added to its own.

    A file without any bias (the seed's) sets the biases to zero, and a line on stderr says so.

    Args:
        model: a `SelectMoeForCausalLM`.
        path: `full_rank_weights.pt`, `full_rank_weights.safetensors`, `adapter_model.safetensors`, or the folder that
            holds one.

    Raises:
        UserError: a tensor is missing or foreign, has another shape, or is not finite. The model is then unchanged.
    """
    if adapter := adapter_folder(path):
        load_adapters(model, adapter)
        return
    tensors = read_router_weights(path)
    wanted = router_parameters(model)
    if not set(tensors) & set(wanted):
        raise UserError(f"{path}: not one of its {len(tensors)} tensors belongs to this model (first: {min(tensors)})")
    biases = {name for name in wanted if name.endswith("quality_gate.bias")}
    if not biases & set(tensors):
        tensors |= {name: torch.zeros(1) for name in biases}
        print(f"{path} holds no gate biases (the predecessor's form): they are set to 0", file=sys.stderr)
    if missing := sorted(set(wanted) - set(tensors)):
        raise UserError(f"{path} lacks {missing[0]} ({len(missing)} of the model's {len(wanted)} tensors are missing)")
    if foreign := sorted(set(tensors) - set(wanted)):
        raise UserError(f"{path} holds {foreign[0]}, which this model does not have ({len(foreign)} foreign tensors)")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            here, there = tuple(wanted[name].shape), tuple(tensor.shape)
            raise UserError(f"{path}: {name} has the shape {there}, the model's is {here}")
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds a value that is not finite")
    for name, tensor in tensors.items():
        wanted[name].data = tensor.to(wanted[name].device, copy=True)
