"""Prove that conversion changed nothing that it should not: tensor by tensor, and by running both models on real text.

    selectmoe verify original_model=out/upcycle converted_model=out/convert data=out/ingest output_dir=out/verify

In: both checkpoints, and a pool whose rows are the text (without one, a few built-in sentences). Out: `verify.json`, and
a table on stderr. It holds tensors missing, extra or changed; tokenizer files; and, in one dtype and back end, whether
logits and router logits equal OLMoE's to the bit with the gates opened (g = 1) and how far they move as initialised. A
difference is exit code 3, after the report was written. One model is in memory at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selectmoe import checkpoint, stage
from selectmoe.config import StageConfig, execution, identity, input_
from selectmoe.convert import gate_name
from selectmoe.errors import Refused, UserError
from selectmoe.pool import locate, read_pool

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STAGE = "verify"
VERSION = 1

SENTENCES = (
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "To boil an egg, put it into boiling water for seven minutes, then cool it under the tap.",
    "def area(radius):\n    return 3.14159 * radius ** 2",
    "Water freezes at 0 degrees Celsius; at sea level it boils at 100.",
)
"""Text for a verification without a pool."""


@dataclass
class VerifyConfig(StageConfig):
    """Configuration of `verify`."""

    original_model: str = input_(doc="the OLMoE checkpoint that was converted: folder or hub name")
    converted_model: str = input_(doc="the Select-MoE checkpoint that `convert` made of it")
    data: str = input_(
        "", doc="pool (or ingest's output) whose rows are run through both models; default built-in text"
    )
    rows: int = identity(4, doc="rows of text to run; 0 compares tensors only")
    max_length: int = identity(128, doc="tokens per row at most")
    show: int = execution(10, doc="differing tensors named on stderr")

    def validate(self) -> None:
        """Refuse numbers out of range.

        Raises:
            UserError: a value is out of its range.
        """
        if self.rows < 0:
            raise UserError(f"rows={self.rows} must not be negative")
        if self.max_length < 2:
            raise UserError(f"max_length={self.max_length} must be at least 2")
        if self.show < 1:
            raise UserError(f"show={self.show} must be at least 1")


def run(config: VerifyConfig) -> Path:
    """Compare both checkpoints.

    Returns:
        The output directory; `verify.json` in it says that nothing differs.

    Raises:
        UserError: a checkpoint is not there or of another kind.
        Refused: something differs; the report is written all the same.
    """
    config.validate()
    original = checkpoint.resolve(config.original_model, ("olmoe",), "original_model")
    converted = checkpoint.resolve(
        config.converted_model, ("select_moe",), "converted_model", "it comes from `convert`"
    )
    pool = str(locate(config.data)) if config.data else ""
    inputs = {"original_model": str(original.path), "converted_model": str(converted.path), "data": pool}
    with stage.begin(STAGE, VERSION, config, inputs=inputs) as out:
        if not out.done:
            report = compare(original, converted, texts(pool, config.rows), config)
            checkpoint.write_json(out.staging / "verify.json", report)
            out.commit()
    report = json.loads((out.path / "verify.json").read_text(encoding="utf-8"))
    print(table(report, config.show), file=sys.stderr)
    if not report["equal"]:
        raise Refused(
            f"{config.converted_model} differs from {config.original_model}: {'; '.join(report['differences'][:3])}"
        )
    return out.path


def texts(pool: str, rows: int) -> list[str]:
    """The first `rows` rows of a pool as plain text, or the built-in sentences."""
    if not pool:
        return list(SENTENCES[:rows])
    return ["\n".join(m["content"] for m in row.messages) for row in read_pool(pool)[:rows]]


def compare(
    original: checkpoint.Source, converted: checkpoint.Source, text: list[str], config: VerifyConfig
) -> dict[str, Any]:
    """The content of `verify.json`."""
    report: dict[str, Any] = {
        "tensors": compare_tensors(original, converted),
        "config": compare_configs(original.config, converted.config),
        "tokenizer": compare_tokenizers(original.path, converted.path),
    }
    tensors = report["tensors"]
    differences = [f"{kind} {name}" for kind in ("missing", "extra", "changed") for name in tensors[kind]]
    differences += [f"config {key}" for key in report["config"]] + [f"tokenizer {name}" for name in report["tokenizer"]]
    structure = tensors["missing"] or tensors["extra"] or any("bits" not in why for why in tensors["changed"].values())
    if not text:
        report["forward"] = {"skipped": "no row of text was asked for"}
    elif structure or report["config"]:
        report["forward"] = {"skipped": "the checkpoints differ in structure"}
    else:
        forward = report["forward"] = compare_forward(original, converted, text, config)
        differences += [what for what in ("logits", "router_logits") if not forward["gate_open"][what]["equal"]]
        if forward["gate_mode"] == "observer":
            as_is = forward["as_initialised"]
            differences += [
                f"{what} (gates as they are)" for what in ("logits", "router_logits") if not as_is[what]["equal"]
            ]
    return report | {"differences": differences, "equal": not differences}


def compare_tensors(original: checkpoint.Source, converted: checkpoint.Source) -> dict[str, Any]:
    """Names that are missing or extra, and a reason for each tensor that changed; one pair in memory at a time."""
    ours, theirs = checkpoint.tensor_places(converted.path), checkpoint.tensor_places(original.path)
    layers = range(int(original.config["num_hidden_layers"]))
    gates = {gate_name(layer, kind) for layer in layers for kind in ("weight", "bias")}
    changed: dict[str, str] = {}
    with _Reader() as reader:
        for name in sorted(set(ours) & set(theirs)):
            if why := _change(reader.get(theirs[name], name), reader.get(ours[name], name)):
                changed[name] = why
        for name in sorted(gates & set(ours)):
            shape = (1, int(original.config["hidden_size"])) if name.endswith("weight") else (1,)
            gate = reader.get(ours[name], name)
            if tuple(gate.shape) != shape or not gate.isfinite().all():
                changed[name] = f"gate of shape {list(gate.shape)}, expected finite {list(shape)}"
    return {
        "compared": len(set(ours) & set(theirs)),
        "gates": len(gates & set(ours)),
        "missing": sorted((set(theirs) | gates) - set(ours)),
        "extra": sorted(set(ours) - set(theirs) - gates),
        "changed": changed,
    }


class _Reader:
    """Tensors out of shards that stay open while they are needed."""

    def __init__(self) -> None:
        self._files: dict[Path, Any] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def get(self, shard: Path, name: str) -> Tensor:
        from safetensors import safe_open

        if shard not in self._files:
            self._files[shard] = self._stack.enter_context(safe_open(str(shard), framework="pt"))
        tensor: Tensor = self._files[shard].get_tensor(name)
        return tensor


def _change(before: Tensor, after: Tensor) -> str:
    """Why two tensors are not the same; empty where they are, to the bit."""
    import torch

    if before.dtype != after.dtype:
        return f"dtype {_dtype(before)} became {_dtype(after)}"
    if before.shape != after.shape:
        return f"shape {list(before.shape)} became {list(after.shape)}"
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[before.element_size()]
    before, after = (t.contiguous().reshape(-1).view(whole) for t in (before, after))
    if torch.equal(before, after):
        return ""
    return f"bits: {int((before != after).sum())} of {before.numel()} values differ"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def compare_configs(original: dict[str, Any], converted: dict[str, Any]) -> dict[str, list[Any]]:
    """Keys of the original's config that have another value in the converted one: key -> [before, after]."""
    expected = {"model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "enable_load_balancing"}
    keys = sorted(set(original) - expected)
    return {key: [original[key], converted.get(key)] for key in keys if converted.get(key) != original[key]}


def compare_tokenizers(original: Path, converted: Path) -> dict[str, str]:
    """Tokenizer and generation files that differ: name -> missing, extra or changed."""

    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""

    found: dict[str, str] = {}
    for name in checkpoint.COMPANIONS:
        before, after = digest(original / name), digest(converted / name)
        if before != after:
            found[name] = "changed" if before and after else "missing" if before else "extra"
    return found


def compare_forward(
    original: checkpoint.Source, converted: checkpoint.Source, text: list[str], config: VerifyConfig
) -> dict[str, Any]:
    """Logits and router logits of both models on the same tokens, in the same dtype and back end."""
    from selectmoe.device import deterministic, pick_device, set_threads
    from selectmoe.modeling import OriginalOlmoe, load_judge, open_gates, realign

    set_threads(config.threads)
    deterministic(config.seed)
    device = pick_device()
    ids, mask = encode(original.path, text, config.max_length, int(original.config["vocab_size"]))
    ids, mask = ids.to(device), mask.to(device)
    model = OriginalOlmoe.from_pretrained(original.path, dtype="auto").to(device).eval()
    realign(model)
    before = outputs(model, ids, mask)
    dtype, experts = model.dtype, model.config._experts_implementation
    del model
    judge = load_judge(converted.path, device, dtype)
    judge.set_experts_implementation(experts)
    as_is = distances(before, outputs(judge, ids, mask), mask)
    open_gates(judge)
    opened = distances(before, outputs(judge, ids, mask), mask)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "experts": experts,
        "attention": judge.config._attn_implementation,
        "gate_mode": judge.config.gate_mode,
        "rows": len(text),
        "tokens": int(mask.sum()),
        "gate_open": opened,
        "as_initialised": as_is,
    }


def encode(path: Path, text: list[str], max_length: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, [B, T], padded on the right; bytes stand for tokens where there is no tokenizer."""
    import torch

    if any((path / name).is_file() for name in checkpoint.TOKENIZER_FILES):
        from selectmoe.template import load_tokenizer

        ids = [list(x) for x in load_tokenizer(path)(text, truncation=True, max_length=max_length)["input_ids"]]
    else:
        ids = [[byte % vocabulary for byte in t.encode()[:max_length]] for t in text]
    length = max(max(len(row) for row in ids), 1)
    padded = torch.tensor([row + [0] * (length - len(row)) for row in ids], dtype=torch.long)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids], dtype=torch.long)
    return padded, mask


def outputs(model: torch.nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """`logits` [B, T, V] and `router_logits` [L, B, T, E] in the model's own dtype, on the CPU."""
    import torch

    with torch.inference_mode():
        out = model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False)
    routers = torch.stack([layer.reshape(*ids.shape, -1) for layer in out.router_logits])
    return {"logits": out.logits.cpu(), "router_logits": routers.cpu()}


def distances(before: dict[str, Tensor], after: dict[str, Tensor], mask: Tensor) -> dict[str, dict[str, Any]]:
    """Per output: whether it is the same to the bit, and the largest and the mean distance over valid tokens."""
    import torch

    valid = mask.bool().cpu()
    found: dict[str, dict[str, Any]] = {}
    for what, old in before.items():
        new = after[what]
        gap = (
            (old.float() - new.float()).abs()[..., valid, :]
            if what != "logits"
            else (old.float() - new.float()).abs()[valid]
        )
        finite = bool(gap.isfinite().all())
        found[what] = {
            "equal": torch.equal(old, new),
            "max_distance": round(float(gap.max()), 9) if finite else None,
            "mean_distance": round(float(gap.mean()), 9) if finite else None,
        }
    return found


def table(report: dict[str, Any], show: int) -> str:
    """The report for a person."""
    tensors, forward = report["tensors"], report["forward"]
    lines = [f"{'tensors compared':<28}{tensors['compared']}, and {tensors['gates']} gate tensors"]
    for kind in ("missing", "extra", "changed"):
        names = list(tensors[kind])
        lines.append(f"{'tensors ' + kind:<28}{len(names)}")
        for name in names[:show]:
            lines.append(f"    {name}" + (f": {tensors[kind][name]}" if kind == "changed" else ""))
        if len(names) > show:
            lines.append(f"    and {len(names) - show} more (verify.json)")
    for what in ("config", "tokenizer"):
        lines.append(f"{what + ' differences':<28}{', '.join(report[what]) or 'none'}")
    if "skipped" in forward:
        lines.append(f"{'forward pass':<28}skipped: {forward['skipped']}")
    else:
        lines.append(
            f"{'forward pass':<28}{forward['tokens']} tokens, {forward['dtype']}, gate_mode {forward['gate_mode']}"
        )
        for gates in ("gate_open", "as_initialised"):
            for what, found in forward[gates].items():
                same = "equal to the bit" if found["equal"] else f"moved by {found['max_distance']} at most"
                lines.append(f"    {gates + ', ' + what:<36}{same}")
    lines.append(f"{'verdict':<28}{'equal' if report['equal'] else 'DIFFERENT'}")
    return "\n".join(lines)
