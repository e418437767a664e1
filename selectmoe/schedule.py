"""The learning rate of a step, in one place for warm-up and fine-tuning.

No command runs this module. A schedule is a function of the step alone, so that a resumed run needs no state of it.
"""

from __future__ import annotations

import math

SCHEDULERS = ("linear", "cosine", "constant")


def learning_rate(step: int, steps: int, peak: float, warmup_ratio: float, scheduler: str = "linear") -> float:
    """Linear rise over ceil(ratio * steps) steps, then what the scheduler says.

    Args:
        step: number of the step, from 0.
        steps: how many there are.
        peak: the largest rate.
        warmup_ratio: share of the steps in which the rate rises.
        scheduler: `linear` and `cosine` decay towards a 0 that would be reached one step after the last; `constant` stays.
    """
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    left = (steps - step) / (steps - warmup)
    factor = {"linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2, "constant": 1.0}[scheduler]
    return peak * factor
