"""What a run will cost, before it starts: rows, tokens, FLOPs, bytes on disk, hours by device.

No command runs this module; `selectmoe check` prints it. Everything is arithmetic on sizes that are known beforehand; a
token is taken as four bytes of text. lm-eval's tasks are not in it: their sizes are known only once they are loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selectmoe.run import RunConfig

BYTES_PER_TOKEN = 4.0
"""UTF-8 bytes of English text per token of a BPE tokenizer, about."""
DEVICES = {"cpu": 1e11, "a100": 1.5e14, "h100": 4e14}
"""FLOP/s that a stage reaches, about; the CPU is two cores."""
FORWARD, FROZEN = 2.0, 4.0
"""FLOPs per active parameter and token: a forward pass; forward and backward without the frozen weights' gradients."""
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Pool:
    """Sizes of the data: usable rows, UTF-8 bytes of all their text, and of the answers alone; rows that are held out."""

    rows: int
    text: int
    answers: int
    held: int


@dataclass(frozen=True)
class Model:
    """Sizes of a checkpoint: parameters, bytes of its weights, and its config.json."""

    parameters: int
    bytes: int
    config: dict[str, Any]

    def size(self, name: str, default: int = 0) -> int:
        """A number of the model's config, such as hidden_size."""
        return int(self.config.get(name) or default)

    @property
    def expert(self) -> int:
        """Parameters of one expert (or of a dense model's MLP) in all layers."""
        return 3 * self.size("hidden_size") * self.size("intermediate_size") * self.size("num_hidden_layers")


def judge_of(config: RunConfig, source: Model | None) -> tuple[Model, int]:
    """The judge that a run makes of its source, and how many of its parameters work on a token."""
    if source is None:  # judge=pretrain
        p = config.pretrain
        vocabulary = p.vocab_size or 4096
        made = {"hidden_size": p.hidden_size, "intermediate_size": p.intermediate_size, "num_hidden_layers": p.layers}
        made |= {"num_experts": p.experts, "num_experts_per_tok": p.top_k}
        source = Model(0, 0, made)
        size = p.experts * source.expert + 4 * p.hidden_size**2 * p.layers + 2 * vocabulary * p.hidden_size
        source = Model(size, 4 * size, made)
    elif config.judge == "upcycle":
        u = config.upcycle
        made = source.config | {"num_experts": u.experts, "num_experts_per_tok": u.top_k}
        size = source.parameters + (u.experts - 1) * source.expert
        source = Model(size, round(source.bytes * size / max(1, source.parameters)), made)
    idle = source.size("num_experts", 1) - source.size("num_experts_per_tok", 1)
    return source, source.parameters - idle * source.expert


def adapter_bytes(config: RunConfig, target: Model) -> int:
    """Bytes of one LoRA adapter in float32, about."""
    t, hidden = config.finetune.training, target.size("hidden_size")
    widths = [hidden + (target.size("intermediate_size") if name in MLP else hidden) for name in t.target_modules]
    return 4 * t.lora_r * sum(widths) * (t.layers or target.size("num_hidden_layers"))


def estimate(
    config: RunConfig, pool: Pool, rows_selected: int, source: Model | None, target: Model | None
) -> dict[str, Any]:
    """The cost of a run.

    Args:
        config: of the whole run.
        pool: sizes of the data.
        rows_selected: what the budget comes to.
        source: what the judge is made from; None: it is trained from nothing.
        target: the model to fine-tune; None: the judge's source.

    Returns:
        rows, rows_selected, tokens, flops by stage and in total, bytes by place, fine_tunings, hours by device.
    """
    judge, active = judge_of(config, source)
    target = target or source or judge
    tunings = len(config.arms) * config.seeds
    tokens = pool.text / BYTES_PER_TOKEN
    per_row = tokens / pool.rows
    t, w = config.finetune.training, config.warmup.training
    warm = (
        w.epochs
        * (w.rows or (1 if w.subset_ratio is None else w.subset_ratio) * pool.rows)
        * (1 + (w.ratio if config.warmup.loss == "contrastive" else 0))
    )
    passes = 1 + config.route.nll + config.route.ifd
    depth = t.layers / max(1, target.size("num_hidden_layers")) if t.layers else 1.0
    flops = {
        "warmup": FROZEN * active * warm * min(per_row, w.max_length),
        "route": FORWARD * active * tokens * passes,
        "finetune": FROZEN
        * target.parameters
        * depth
        * tunings
        * t.epochs
        * rows_selected
        * min(per_row, t.max_length),
        "evaluate": FORWARD * target.parameters * depth * (tunings + 1) * pool.held * per_row,
    }
    layers = judge.size("num_hidden_layers")
    routed = pool.rows * 4 * layers * (judge.size("num_experts", 1) + 4)
    checkpoints = judge.bytes * (1 if config.judge == "olmoe" else 2)
    total = sum(flops.values())
    return {
        "rows": pool.rows,
        "rows_selected": rows_selected,
        "tokens": round(tokens),
        "judge_parameters": judge.parameters,
        "target_parameters": target.parameters,
        "fine_tunings": tunings,
        "flops": {name: float(f"{value:.4g}") for name, value in flops.items()} | {"total": float(f"{total:.4g}")},
        "bytes": {
            "output_dir": math.ceil(3 * pool.text + 2 * routed + 2 * tunings * adapter_bytes(config, target)),
            "model_root": checkpoints,
            "work_root": math.ceil(routed + 3 * adapter_bytes(config, target)),
        },
        "hours": {name: float(f"{total / speed / 3600:.3g}") for name, speed in DEVICES.items()},
    }


def describe(costs: dict[str, Any]) -> str:
    """The estimate in a few lines for the screen."""
    flops, hours = costs["flops"], costs["hours"]
    stages = ", ".join(
        f"{name} {100 * value / flops['total']:.0f} %" for name, value in flops.items() if name != "total"
    )
    places = ", ".join(f"{_short(value)}B in {name}" for name, value in costs["bytes"].items())
    return "\n".join(
        [
            f"  data     {costs['rows']} rows, about {_short(costs['tokens'])} tokens; {costs['rows_selected']} rows are selected",
            f"  models   judge {_short(costs['judge_parameters'])} parameters, target {_short(costs['target_parameters'])};"
            f" {costs['fine_tunings']} fine-tunings",
            f"  compute  {flops['total']:.1e} FLOPs ({stages})",
            f"  time     about {', '.join(f'{_hours(value)} on {name}' for name, value in hours.items())}",
            f"  disk     about {places}",
        ]
    )


def _short(number: float) -> str:
    """A number with a decimal prefix: 134.5M."""
    for power, prefix in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.1f} {prefix}"
    return f"{number:.0f} "


def _hours(hours: float) -> str:
    """Hours in the unit that fits: 3.1 h, 12 min, 40 s."""
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.0f} min" if hours >= 1 / 60 else f"{max(1, math.ceil(hours * 3600))} s"
