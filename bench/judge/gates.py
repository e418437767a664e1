"""Observers trained and scored on features that were read once: what `warmup` and `route` do, without the model.

No command runs this module. `tests/unit/test_study_judge.py` proves on a small model that the scores are those of the two
stages. Batches, losses and initial weights are the product's own; AdamW, its rate and the clipping are as in `warmup`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bench.judge.features import Features, Part
from bench.judge.pools import Key
from selectmoe.convert import initial_gate
from selectmoe.losses import quality_loss
from selectmoe.warmup import WarmupTraining

Arrays = dict[str, npt.NDArray[np.float32]]
ARRAYS = ("quality_score", "good_ratio", "quality_score_answer", "good_ratio_answer")
"""What the score of a row is made of: [rows, L] each, as in router data."""


class Gates(NamedTuple):
    """The gates of a judge: weight [L, H] and bias [L]."""

    weight: Tensor
    bias: Tensor

    def negated(self) -> Gates:
        """The gates that say the opposite."""
        return Gates(-self.weight, -self.bias)


def initial(layers: int, hidden: int, bias: float, seed: int, std: float = 0.02) -> Gates:
    """The gates that `convert seed=SEED` makes."""
    options = {
        "hidden_size": hidden,
        "quality_gate_init_std": std,
        "quality_gate_init_mean": 0.0,
        "quality_gate_init_bias": bias,
    }
    pairs = [initial_gate(layer, options, seed) for layer in range(layers)]
    return Gates(torch.cat([weight for weight, _ in pairs]), torch.cat([b for _, b in pairs]))


def train(
    found: Features,
    steps: Sequence[Sequence[tuple[Key, int]]],
    loss: str,
    start: Gates,
    rate: float,
    weight: float = 1.0,
) -> Gates:
    """Train gates.

    Args:
        found: holds the rows.
        steps: keys of the rows of every step, with their labels.
        loss: a name in `LOSSES`.
        start: initial gates.
        rate: peak learning rate; decays linearly to 0.
        weight: quality_loss_weight.
    """
    gates = Gates(start.weight.clone().requires_grad_(), start.bias.clone().requires_grad_())
    optimizer = torch.optim.AdamW(gates, lr=rate, weight_decay=0.0)
    longest = max(sum(len(found.row(key)[0]) for key, _ in step) for step in steps)
    buffer = torch.empty(longest, *start.weight.shape)  # one for all steps: fresh memory costs more than the copy
    limit = float(getattr(WarmupTraining(), "max_grad_norm", 0.0)) or float("inf")
    for n, step in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - n / len(steps))
        optimizer.zero_grad()
        rows = [found.row(key) for key, _ in step]
        lengths = torch.tensor([len(hidden) for hidden, _ in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        answer = torch.zeros(mask.shape, dtype=torch.bool)
        answer[mask] = torch.cat([marks for _, marks in rows])
        hidden = torch.cat([hidden for hidden, _ in rows], out=buffer[: int(lengths.sum())])
        scores = by_layer(hidden, gates.weight[:, :, None])[..., 0] + gates.bias[:, None]
        padded = torch.zeros(len(scores), mask.numel())
        padded = padded.index_copy(1, mask.flatten().nonzero()[:, 0], scores)
        labels = torch.tensor([label for _, label in step])
        value = weight * quality_loss(loss, list(padded.view(-1, *mask.shape)), mask, None, labels, answer)
        torch.autograd.backward(value)
        torch.nn.utils.clip_grad_norm_(gates, limit)
        optimizer.step()
    return Gates(gates.weight.detach(), gates.bias.detach())


def by_layer(hidden: Tensor, weight: Tensor) -> Tensor:
    """[tokens, L, H] and [L, H, judges] -> [L, tokens, judges]; a batched product would copy the hidden states first."""
    return torch.stack([hidden[:, layer] @ weight[layer] for layer in range(len(weight))])


@torch.inference_mode()
def pooled(found: Features, judges: Sequence[Gates], keys: Sequence[Key]) -> list[Arrays]:
    """The four pooled arrays of every judge, rows in the order of `keys`.

    Args:
        found: holds the rows.
        judges: several are scored while the features are read once.
        keys: of the rows.
    """
    place = {key: n for n, key in enumerate(keys)}
    layers = len(judges[0].bias)
    out = [{name: np.full((len(keys), layers), np.nan, np.float32) for name in ARRAYS} for _ in judges]
    weight = torch.stack([gates.weight for gates in judges], dim=2)  # [L, H, judges]
    bias = torch.stack([gates.bias for gates in judges], dim=1)[:, None]
    for part in found.parts:
        at = [place.get(key, -1) for key in part.keys]
        if max(at) < 0:
            continue
        scores = (by_layer(part.hidden, weight) + bias).permute(2, 1, 0)  # [judges, tokens, L]
        for arrays, raw in zip(out, scores, strict=True):
            for name, values in _means(part, raw).items():
                for n, target in enumerate(at):
                    if target >= 0:
                        arrays[name][target] = values[n]
    return out


def _means(part: Part, raw: Tensor) -> Arrays:
    """Means per row of one part: [rows, L]."""
    good = torch.sigmoid(raw)
    answer = torch.from_numpy(part.answer)[:, None]
    out = {}
    for name, values, over in (
        ("quality_score", raw, None),
        ("good_ratio", good, None),
        ("quality_score_answer", raw, answer),
        ("good_ratio_answer", good, answer),
    ):
        kept = values if over is None else torch.where(over, values, 0)
        counts = (
            np.diff(part.starts) if over is None else np.add.reduceat(part.answer.astype(np.int64), part.starts[:-1])
        )
        sums = np.add.reduceat(kept.double().numpy(), part.starts[:-1], axis=0)
        out[name] = (sums / counts[:, None]).astype(np.float32)
    return out
