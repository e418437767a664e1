"""Prove that conversion changed nothing that it should not: tensor by tensor, and layer by layer on real text.

    selectmoe verify original_model=out/upcycle converted_model=out/convert data=out/ingest output_dir=out/verify

In: both checkpoints, and a pool whose rows are the text (without one, a few built-in sentences). Out: `verify.json`, and
a table on stderr. It holds every tensor and what is wrong with it (missing, extra, changed, in another shard than the index
says); config; tokenizer and licence files; and, in one dtype and back end, whether logits, and router logits and hidden
states of every layer, equal OLMoE's to the bit with the gates opened (g = 1), and how far they move as initialised. A
difference is exit code 3, after the report was written. Tensors are compared in chunks; one model is in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selectmoe import checkpoint, shards, stage
from selectmoe.config import StageConfig, execution, identity, input_
from selectmoe.convert import DTYPES, GateOptions, gate_name
from selectmoe.errors import Refused, UserError
from selectmoe.pool import locate, read_pool

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STAGE = "verify"
VERSION = 2

SENTENCES = (
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "To boil an egg, put it into boiling water for seven minutes, then cool it under the tap.",
    "def area(radius):\n    return 3.14159 * radius ** 2",
    "Water freezes at 0 degrees Celsius; at sea level it boils at 100.",
)
"""Text for a verification without a pool."""
KINDS = ("missing", "extra", "changed", "misplaced")
"""What can be wrong with a tensor."""


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
    dtype: str = identity("keep", doc="dtype that convert was asked for: the original, cast, is what is expected")
    show: int = execution(10, doc="differing tensors named on stderr")

    def validate(self) -> None:
        """Refuse numbers out of range.

        Raises:
            UserError: a value is out of its range.
        """
        if self.dtype not in DTYPES:
            raise UserError(f"dtype={self.dtype} is unknown; known: {', '.join(DTYPES)}")
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
        "tensors": compare_tensors(original, converted, config.dtype),
        "config": compare_configs(original.config, converted.config, config.dtype),
        "files": compare_files(original.path, converted.path),
    }
    tensors = report["tensors"]
    differences = [f"{kind} {name}" for kind in KINDS for name in tensors[kind]]
    differences += [f"config {key}" for key in report["config"]] + [f"file {name}" for name in report["files"]]
    structure = tensors["missing"] or tensors["extra"] or any("bits" not in why for why in tensors["changed"].values())
    if not text:
        report["forward"] = {"skipped": "no row of text was asked for"}
    elif structure or report["config"]:
        report["forward"] = {"skipped": "the checkpoints differ in structure"}
    else:
        forward = report["forward"] = compare_forward(original, converted, text, config)
        differences += moved(forward["gate_open"], "")
        if forward["gate_mode"] == "observer":
            differences += moved(forward["as_initialised"], " (gates as they are)")
    return report | {"differences": differences, "equal": not differences}


def compare_tensors(original: checkpoint.Source, converted: checkpoint.Source, dtype: str = "keep") -> dict[str, Any]:
    """Every tensor: names that are missing or extra, and what is wrong with those that are there."""
    ours, theirs = converted.tensors(), original.tensors()
    hidden, layers = int(original.config["hidden_size"]), range(int(original.config["num_hidden_layers"]))
    gates = {gate_name(layer, kind): kind for layer in layers for kind in ("weight", "bias")}
    said: dict[str, str] = {}
    for name in theirs:
        if name not in ours:
            said[name] = "missing"
            continue
        wanted = shards.copied(name, theirs[name]) if dtype == "keep" else shards.cast(name, theirs[name], dtype)
        said[name] = shards.difference(wanted, ours[name])
    for name, kind in gates.items():
        said[name] = gate_fault(ours[name], (1, hidden) if kind == "weight" else (1,)) if name in ours else "missing"
    said |= {name: "extra" for name in ours if name not in said}
    faults = {name: why for name, why in sorted(said.items()) if why}
    return {
        "compared": len(set(ours) & set(theirs)),
        "gates": len(gates.keys() & ours.keys()),
        "missing": [name for name, why in faults.items() if why == "missing"],
        "extra": [name for name, why in faults.items() if why == "extra"],
        "changed": {name: why for name, why in faults.items() if why not in ("missing", "extra")},
        "misplaced": converted.misplaced(ours),
        "each": {name: said[name] or "equal" for name in sorted(said)},
    }


def gate_fault(gate: shards.Stored, shape: tuple[int, ...]) -> str:
    """What is wrong with a quality gate's tensor; empty where nothing is."""
    import numpy as np

    if gate.dtype != "F32" or gate.shape != shape:
        return f"gate of shape {list(gate.shape)} in {gate.dtype}, expected {list(shape)} in F32"
    finite = all(np.isfinite(np.frombuffer(data, "<f4")).all() for data in gate.chunks())
    return "" if finite else "gate that is not finite"


def compare_configs(original: dict[str, Any], converted: dict[str, Any], dtype: str = "keep") -> dict[str, list[Any]]:
    """Keys that mean another model: key -> [before, after]. What is not said counts as OLMoE's default."""
    from transformers import OlmoeConfig

    ours = {
        "model_type",
        "architectures",
        "transformers_version",
        "torch_dtype",
        *(f.name for f in fields(GateOptions)),
    }
    both = []
    for config in (original, converted):
        known = {key: value for key, value in config.items() if key not in ours}
        known["dtype"] = config.get("dtype") or config.get("torch_dtype")
        both.append(OlmoeConfig(**known).to_dict() | {"qk_norm": config.get("qk_norm", True)})
    before, after = both
    before["dtype"] = before.get("dtype") if dtype == "keep" else dtype
    keys = sorted({*before, *after} - ours - {"quality_loss_params", "_name_or_path"})
    return {key: [before.get(key), after.get(key)] for key in keys if before.get(key) != after.get(key)}


def compare_files(original: Path, converted: Path) -> dict[str, str]:
    """Tokenizer, generation and licence files that differ: name -> missing, extra or changed."""

    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""

    found: dict[str, str] = {}
    for name in sorted({*checkpoint.companions(original), *checkpoint.companions(converted)}):
        before, after = digest(original / name), digest(converted / name)
        if before != after:
            found[name] = "changed" if before and after else "missing" if before else "extra"
    return found


def compare_forward(
    original: checkpoint.Source, converted: checkpoint.Source, text: list[str], config: VerifyConfig
) -> dict[str, Any]:
    """Logits, and every layer's router logits and hidden states, of both models on the same tokens, dtype and back end."""
    from selectmoe.device import deterministic, pick_device, set_threads
    from selectmoe.modeling import OriginalOlmoe, open_gates, realign

    set_threads(config.threads)
    deterministic(config.seed)
    device = pick_device()
    ids, mask = encode(original.path, text, config.max_length, int(original.config["vocab_size"]))
    ids, mask = ids.to(device), mask.to(device)
    wanted = "auto" if config.dtype == "keep" else config.dtype
    model = OriginalOlmoe.from_pretrained(original.path, dtype=wanted).to(device).eval()
    realign(model)
    before = outputs(model, ids, mask)
    dtype, experts = model.dtype, model.config._experts_implementation
    del model
    judge = load_converted(converted, device, dtype)
    judge.set_experts_implementation(experts)
    gates = [(layer.quality_gate.bias.detach(), layer.quality_gate.weight.detach()) for layer in judge.model.layers]
    found = {
        "dtype": str(dtype).removeprefix("torch."),
        "experts": experts,
        "attention": judge.config._attn_implementation,
        "gate_mode": judge.config.gate_mode,
        "rows": len(text),
        "tokens": int(mask.sum()),
        "gates": [{"bias": float(bias), "weight_std": float(weight.std(correction=0))} for bias, weight in gates],
        "as_initialised": distances(before, outputs(judge, ids, mask), mask),
    }
    open_gates(judge)
    return found | {"gate_open": distances(before, outputs(judge, ids, mask), mask)}


def load_converted(converted: checkpoint.Source, device: Any, dtype: Any) -> Any:
    """The converted model; a custom trash expert, which no checkpoint can bring, counts as zero."""
    import torch

    from selectmoe.modeling import SelectMoeForCausalLM, load_judge, realign

    if converted.config.get("trash_expert_mode") != "custom":
        return load_judge(converted.path, device, dtype)
    judge = SelectMoeForCausalLM.from_pretrained(converted.path, dtype=dtype).to(device).eval()
    judge.set_trash_expert(lambda hidden, training: torch.zeros_like(hidden))
    realign(judge)
    return judge


def moved(found: dict[str, Any], note: str) -> list[str]:
    """The names of the outputs that are not equal."""
    names = [what for what in ("logits", "router_logits") if not found[what]["equal"]]
    names += [
        f"layer {number} {what}"
        for number, layer in enumerate(found["layers"])
        for what in ("router_logits", "hidden_states")
        if not layer[what]["equal"]
    ]
    return [name + note for name in names]


def encode(path: Path, text: list[str], max_length: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, [B, T], padded on the right; bytes stand for tokens where there is no tokenizer."""
    import torch

    if any((path / name).is_file() for name in checkpoint.TOKENIZER_FILES):
        from selectmoe.template import load_tokenizer

        ids = [list(x) for x in load_tokenizer(path)(text, truncation=True, max_length=max_length)["input_ids"]]
    else:
        ids = [[byte % vocabulary for byte in t.encode()[:max_length]] for t in text]
    if (largest := max((token for row in ids for token in row), default=0)) >= vocabulary:
        raise UserError(f"{path}: its tokenizer gives token {largest}, its embedding has {vocabulary}: they do not fit")
    length = max(max(len(row) for row in ids), 1)
    padded = torch.tensor([row + [0] * (length - len(row)) for row in ids], dtype=torch.long)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids], dtype=torch.long)
    return padded, mask


def outputs(model: torch.nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """`logits` [B, T, V], `router_logits` [L, B, T, E], `hidden_states` [L, B, T, H] in the model's dtype, on the CPU."""
    import torch

    with torch.inference_mode():
        out = model(
            input_ids=ids,
            attention_mask=mask,
            output_router_logits=True,
            output_hidden_states=True,
            use_cache=False,
        )
    routers = torch.stack([layer.reshape(*ids.shape, -1) for layer in out.router_logits])
    hidden = torch.stack(out.hidden_states[1:])  # the first is the embedding
    return {"logits": out.logits.cpu(), "router_logits": routers.cpu(), "hidden_states": hidden.cpu()}


def distances(before: dict[str, Tensor], after: dict[str, Tensor], mask: Tensor) -> dict[str, Any]:
    """Logits, all router logits, and the layers one by one: equal to the bit or not, largest and mean distance."""
    valid = mask.bool().cpu()
    routers, hidden = (list(zip(before[n], after[n], strict=True)) for n in ("router_logits", "hidden_states"))
    layers = [
        {"router_logits": distance(*r, valid), "hidden_states": distance(*h, valid)}
        for r, h in zip(routers, hidden, strict=True)
    ]
    each = [layer["router_logits"] for layer in layers]
    gaps = [gap["max_distance"] for gap in each]
    return {
        "logits": distance(before["logits"], after["logits"], valid),
        "router_logits": {
            "equal": all(gap["equal"] for gap in each),
            "max_distance": None if None in gaps else max(gaps),
        },
        "layers": layers,
    }


def distance(old: Tensor, new: Tensor, valid: Tensor) -> dict[str, Any]:
    """Of two tensors [B, T, ...]: equal to the bit, and the largest and the mean distance over valid tokens."""
    import torch

    gap = (old.float() - new.float()).abs()[valid]
    finite = bool(gap.isfinite().all())
    return {
        "equal": torch.equal(old, new),
        "max_distance": round(float(gap.max()), 9) if finite else None,
        "mean_distance": round(float(gap.mean()), 9) if finite else None,
    }


def table(report: dict[str, Any], show: int) -> str:
    """The report for a person."""
    tensors, forward = report["tensors"], report["forward"]
    lines = [f"{'tensors compared':<28}{tensors['compared']}, and {tensors['gates']} gate tensors"]
    for kind in KINDS:
        names = list(tensors[kind])
        lines.append(f"{'tensors ' + kind:<28}{len(names)}")
        for name in names[:show]:
            lines.append(f"    {name}" + (f": {tensors[kind][name]}" if kind == "changed" else ""))
        if len(names) > show:
            lines.append(f"    and {len(names) - show} more (verify.json)")
    for what in ("config", "files"):
        said = [f"{name} {why}" if isinstance(why, str) else name for name, why in report[what].items()]
        lines.append(f"{what + ' differences':<28}{', '.join(said) or 'none'}")
    if "skipped" in forward:
        lines.append(f"{'forward pass':<28}skipped: {forward['skipped']}")
    else:
        lines += forward_table(forward)
    lines.append(f"{'verdict':<28}{'equal' if report['equal'] else 'DIFFERENT'}")
    return "\n".join(lines)


def forward_table(forward: dict[str, Any]) -> list[str]:
    """What running both models gave: the logits, then a line per layer."""

    def said(found: dict[str, Any]) -> str:
        if found["equal"]:
            return "equal"
        return "not finite" if found["max_distance"] is None else f"{found['max_distance']:.3g}"

    opened, as_is = forward["gate_open"], forward["as_initialised"]
    lines = [
        f"{'forward pass':<28}{forward['tokens']} tokens, {forward['dtype']}, gate_mode {forward['gate_mode']}",
        f"    {'logits, gates open':<28}{said(opened['logits'])}",
        f"    {'logits, gates as they are':<28}{said(as_is['logits'])}",
        "    largest distance     gates open          gates as they are",
        f"    {'layer':<8}{'gate bias':<13}{'router':<10}{'hidden':<10}{'router':<10}{'hidden':<10}",
    ]
    for number, gate in enumerate(forward["gates"]):
        found = [
            side["layers"][number][what] for side in (opened, as_is) for what in ("router_logits", "hidden_states")
        ]
        lines.append(f"    {number:<8}{gate['bias']:<13.4g}" + "".join(f"{said(gap):<10}" for gap in found).rstrip())
    return lines
