"""The mean gate of every layer at every step of warm-up: kept with the checkpoint, written as a table and a plot.

No command runs this module; `warmup` writes `gates.csv` (step, layer_0, ...) and `gates.png`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

MAX_STEPS = 2000
"""Steps in the plot at most, evenly spaced; the table has all."""


class GateHistory:
    """Means of g over the pool rows of each step.

    Args:
        steps: how many there will be.
        layers: of the model.
    """

    def __init__(self, steps: int, layers: int) -> None:
        self.means = torch.full((steps, layers), float("nan"))

    def set(self, step: int, means: list[float]) -> None:
        """Note one step."""
        self.means[step] = torch.tensor(means)

    def state(self, steps: int) -> Tensor:
        """[steps, L]: what a checkpoint after so many steps holds."""
        return self.means[:steps].clone()

    def restore(self, state: Tensor) -> None:
        """Take up what a checkpoint holds."""
        self.means[: len(state)] = state

    def write(self, directory: Path) -> None:
        """Write the table and the plot."""
        layers = self.means.shape[1]
        lines = [",".join(["step", *(f"layer_{i}" for i in range(layers))])]
        lines += [",".join([str(i), *(f"{v:.6f}" for v in row)]) for i, row in enumerate(self.means.tolist())]
        (directory / "gates.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        self._plot(directory / "gates.png")

    def _plot(self, path: Path) -> None:
        """Layers from bottom to top, steps from left to right, g as a colour."""
        from matplotlib.figure import Figure

        steps, layers = self.means.shape
        every = max(1, -(-steps // MAX_STEPS))
        figure = Figure(figsize=(7, 3.5), layout="constrained")
        axes = figure.add_subplot()
        shown = self.means[::every].T.numpy()
        extent = (-0.5, steps - 0.5, -0.5, layers - 0.5)
        image = axes.imshow(
            shown, aspect="auto", origin="lower", extent=extent, interpolation="nearest", cmap="viridis"
        )
        axes.set_xlabel("step")
        axes.set_ylabel("layer")
        axes.locator_params(axis="both", integer=True)
        figure.colorbar(image, ax=axes, label="mean good ratio g of pool rows")
        figure.savefig(path, dpi=100, metadata={"Software": None})
