"""What a task asks Kubernetes for: an accelerator by its resource name, how many, and memory as a quantity.

No command runs this module; `selectmoe check accelerator.type=nvidia.com/gpu accelerator.memory=16Gi` reads it, and the
pipeline hands the values to KFP as they stand. So what is accepted here is what Kubernetes *and* KFP accept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from selectmoe.config import execution
from selectmoe.errors import UserError

ACCELERATORS = (
    "nvidia.com/gpu",
    "nvidia.com/gpu.shared",
    "amd.com/gpu",
    "gpu.intel.com/i915",
    "gpu.intel.com/xe",
)
"""Resource names of the device plugins whose devices torch can use."""
MIG = re.compile(r"nvidia\.com/mig-[1-9]\d*g\.[1-9]\d*gb(\.me(\.all)?)?")
"""A slice of an NVIDIA GPU under the `mixed` strategy, such as nvidia.com/mig-1g.10gb."""
QUANTITY = re.compile(r"(\d+)(Ki|Mi|Gi|Ti|Pi|Ei|M|G|T|P|E|)")
"""KFP takes no fraction and writes kilo with a large K, which Kubernetes does not know."""
FACTORS = (
    {"": 1} | {f"{s}i": 1024**n for n, s in enumerate("KMGTPE", 1)} | {s: 1000**n for n, s in enumerate("MGTPE", 2)}
)
LEAST = 64 << 20
"""Bytes of memory in which no Python with its libraries starts: a smaller quantity has lost its unit."""


@dataclass
class AcceleratorConfig:
    """What a task that runs a model asks for."""

    type: str = execution("", doc="resource name of the accelerator, such as nvidia.com/gpu; empty: none")
    count: int = execution(0, doc="accelerators per task that runs a model; 0: none; more need a type")
    memory: str = execution(
        "", doc="memory of a task as a Kubernetes quantity, such as 16Gi; empty: the site's default"
    )

    def validate(self) -> None:
        """Check the names and ranges.

        Raises:
            UserError: an accelerator that is not known, an impossible count, or a memory that is no quantity.
        """
        if self.type and self.type not in ACCELERATORS and not MIG.fullmatch(self.type):
            known = ", ".join([*ACCELERATORS, "nvidia.com/mig-1g.10gb and its like"])
            raise UserError(f"accelerator.type={self.type} is unknown; known: {known}; empty for none")
        if self.count < 0:
            raise UserError(f"accelerator.count={self.count} must not be negative; 0 asks for none")
        if self.count and not self.type:
            raise UserError(f"accelerator.count={self.count} needs accelerator.type, such as nvidia.com/gpu")
        if self.memory:
            parse_memory(self.memory, "accelerator.memory")


def parse_memory(quantity: str, key: str) -> int:
    """Bytes of a Kubernetes quantity.

    Args:
        quantity: such as 16Gi or 500M.
        key: the configuration key that holds it, for messages.

    Raises:
        UserError: it is no quantity, or so small that its unit must be missing.
    """
    match = QUANTITY.fullmatch(quantity)
    if not match:
        raise UserError(
            f"{key}={quantity} is no Kubernetes quantity: write a whole number and Mi, Gi or Ti, as in 16Gi"
        )
    size = int(match[1]) * int(FACTORS[match[2]])
    if size < LEAST:
        raise UserError(f"{key}={quantity} is {size} bytes, too little for any task: is a unit missing, as in 16Gi?")
    return size
