"""The quality losses' names and parameters, without torch: what a configuration is checked against.

No command runs this module; the losses are in `selectmoe.losses`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from selectmoe import allowed_code
from selectmoe.allowed_code import names_code
from selectmoe.errors import UserError

DEFAULTS: dict[str, dict[str, Any]] = {
    "sigmoid": {"sample_wise_averaging": True},
    "mse": {"target": 0.0, "sample_wise_averaging": True},
    "beta_moment_matching": {"beta_target_mean": 0.5, "beta_target_var": 0.05, "w_mean": 1.0, "w_var": 1.0},
    "mean_variance_regularization": {"lambda_var": 0.1},
    "entropy": {"lambda_entropy": 0.05},
    "contrastive": {},
}
"""Loss -> its parameters with their defaults."""

RANGES: dict[str, tuple[float, float]] = {
    "target": (0.0, 1.0),
    "beta_target_mean": (0.0, 1.0),
    "beta_target_var": (0.0, 0.25),
}
"""Parameter -> smallest and largest value (g lies in [0, 1], its variance in [0, 1/4]); the others: 0 or more, finite."""


def check_loss(name: str, params: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The loss's parameters, defaults filled in.

    Raises:
        UserError: an unknown name or parameter, or a value of the wrong type or range (the message lists what is known), or
            an import path that the command line has not allowed: a config may hold none.
    """
    if names_code(name):
        if not allowed_code.allowed(name):
            raise UserError(
                f"quality_loss_type={name} names code, which no checkpoint may: write sigmoid there, and give "
                f"training.quality_loss_type={name} with allow_code=[{name}] to warmup"
            )
        if params:
            raise UserError(f"quality_loss_params has the unknown key {min(params)!r}; {name} knows: none")
        return {}
    if name not in DEFAULTS:
        near = difflib.get_close_matches(name, DEFAULTS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"quality_loss_type={name!r} is unknown{hint}; known: {', '.join(DEFAULTS)}")
    defaults = DEFAULTS[name]
    if unknown := sorted(set(params or {}) - set(defaults)):
        known = ", ".join(defaults) or "none"
        raise UserError(f"quality_loss_params has the unknown key {unknown[0]!r}; {name} knows: {known}")
    return {key: _value(key, (params or {}).get(key, default), default) for key, default in defaults.items()}


def _value(key: str, value: Any, default: Any) -> Any:
    """A parameter's value in its default's type."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UserError(f"quality_loss_params.{key}={value!r} must be true or false")
        return value
    low, high = RANGES.get(key, (0.0, math.inf))
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"quality_loss_params.{key}={value!r} must be a number")
    if not low <= value <= high:
        raise UserError(f"quality_loss_params.{key}={value!r} must be at least {low:g}, at most {high:g}")
    return float(value)
