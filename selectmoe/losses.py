"""The losses of warm-up that OLMoE does not have: what pulls on the quality gates (docs: losses and their parameters).

No command runs this module; `selectmoe.modeling` adds these to the cross-entropy::

    L = CE + router_aux_loss_coef * ([enable_load_balancing] * L_lb + quality_loss_weight * L_q)

Every loss is computed per layer from the raw scores s, with g = sigmoid(s), and averaged over the layers. Valid tokens
are those of the attention mask. All are differentiable and finite, with a single valid token too. `sigmoid` and `mse`
are means; `beta_moment_matching`, `mean_variance_regularization` and `entropy` are *not* linear in the batch: they
are per micro-batch. The load-balancing loss is transformers' own.

A loss of the user's own is named by its import path, `package.module:callable`, and called per layer with the good ratio
[B, T] and the valid tokens [B, T] (bool). It is code: it runs only where the command line allows it (`allowed_code`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from selectmoe import allowed_code
from selectmoe.errors import UserError
from selectmoe.loss_parameters import check_loss

BINS = 20
"""Bins of the differentiable histogram on [0, 1] that `entropy` is taken from."""

Params = Mapping[str, Any]
Loss = Callable[[Tensor, Tensor, Params], Tensor]
"""(raw scores [B, T], valid tokens [B, T] bool, parameters) -> a scalar."""


def _token_mean(values: Tensor, mask: Tensor, by_row: bool) -> Tensor:
    """Mean of [B, T] values over the tokens of a [B, T] mask; by row: per row first, then over rows that have any.

    Without a single token it is zero, still connected to the graph.
    """
    weights = mask.to(values.dtype)
    if by_row:
        per_row = weights.sum(1)
        means = (values * weights).sum(1) / per_row.clamp(min=1)
        return means.sum() / (per_row > 0).sum().clamp(min=1)
    return (values * weights).sum() / weights.sum().clamp(min=1)


def _moments(good: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance of the good ratio over valid tokens."""
    mean = _token_mean(good, mask, by_row=False)
    return mean, _token_mean((good - mean) ** 2, mask, by_row=False)


def _sigmoid(score: Tensor, mask: Tensor, p: Params) -> Tensor:
    return _token_mean(torch.sigmoid(score), mask, p["sample_wise_averaging"])


def _mse(score: Tensor, mask: Tensor, p: Params) -> Tensor:
    return _token_mean((torch.sigmoid(score) - p["target"]) ** 2, mask, p["sample_wise_averaging"])


def _beta_moment_matching(score: Tensor, mask: Tensor, p: Params) -> Tensor:
    mean, variance = _moments(torch.sigmoid(score), mask)
    loss: Tensor = (
        p["w_mean"] * (mean - p["beta_target_mean"]) ** 2 + p["w_var"] * (variance - p["beta_target_var"]) ** 2
    )
    return loss


def _mean_variance(score: Tensor, mask: Tensor, p: Params) -> Tensor:
    mean, variance = _moments(torch.sigmoid(score), mask)
    loss: Tensor = (mean - 0.5) ** 2 - p["lambda_var"] * variance
    return loss


def histogram_entropy(good: Tensor, mask: Tensor) -> Tensor:
    """Entropy (nats) of a 20-bin histogram of the good ratio that has a gradient.

    Args:
        good: [B, T] in [0, 1].
        mask: [B, T] bool, the tokens that count.

    Returns:
        A scalar. Each token spreads over the bins around it by a triangular kernel of half-width 1/20.
    """
    centres = (torch.arange(BINS, device=good.device, dtype=good.dtype) + 0.5) / BINS
    kernel = (1 - BINS * (good[..., None] - centres).abs()).clamp(min=0) * mask[..., None].to(good.dtype)
    counts = kernel.sum((0, 1))
    share = counts / counts.sum().clamp(min=1e-12)
    return -(share * share.clamp(min=1e-12).log()).sum()


def _entropy(score: Tensor, mask: Tensor, p: Params) -> Tensor:
    good = torch.sigmoid(score)
    mean = _token_mean(good, mask, by_row=False)
    loss: Tensor = (mean - 0.5) ** 2 - p["lambda_entropy"] * histogram_entropy(good, mask)
    return loss


def _contrastive(score: Tensor, mask: Tensor, p: Params) -> Tensor:
    labels, answer = p["row_labels"], p["answer_mask"]
    if labels is None or answer is None:
        raise UserError("quality_loss_type=contrastive needs row_labels [B] and answer_mask [B, T] beside the labels")
    target = labels.to(score.dtype)[:, None].expand_as(score)
    loss = F.binary_cross_entropy_with_logits(score, target, reduction="none")
    return _token_mean(loss, mask & answer.to(mask.device, torch.bool), by_row=True)


LOSSES: dict[str, Loss] = {
    "sigmoid": _sigmoid,
    "mse": _mse,
    "beta_moment_matching": _beta_moment_matching,
    "mean_variance_regularization": _mean_variance,
    "entropy": _entropy,
    "contrastive": _contrastive,
}
"""Every quality loss by its name: the function of one layer. Their parameters: `selectmoe.loss_parameters`."""


def _own(path: str) -> Loss:
    """A loss of the user's own, in the form of ours."""
    function = allowed_code.get(path, "quality_loss_type")

    def loss(score: Tensor, mask: Tensor, p: Params) -> Tensor:
        made = function(torch.sigmoid(score), mask)
        if not isinstance(made, Tensor) or made.ndim or (score.requires_grad and not made.requires_grad):
            raise UserError(f"quality_loss_type={path} must give a scalar tensor that has a gradient")
        return made

    return loss


def quality_loss(
    name: str,
    scores: Sequence[Tensor],
    mask: Tensor,
    params: Params | None = None,
    row_labels: Tensor | None = None,
    answer_mask: Tensor | None = None,
) -> Tensor:
    """L_q: the mean over the layers of one quality loss.

    Args:
        name: a key of `LOSSES`, or the import path of one that is allowed.
        scores: per layer the raw quality scores, [B, T] or [B, T, 1].
        mask: [B, T], non-zero where a token is valid (the attention mask).
        params: parameters of the loss; what is not given has its default.
        row_labels: [B], 1 for a row of the pool, 0 for a corrupted copy (`contrastive` only).
        answer_mask: [B, T], non-zero on answer tokens (`contrastive` only).

    Returns:
        A float32 scalar.

    Raises:
        UserError: an unknown name or parameter, or `contrastive` without row labels and answer mask.
    """
    given = check_loss(name, params) | {"row_labels": row_labels, "answer_mask": answer_mask}
    function = LOSSES[name] if name in LOSSES else _own(name)
    valid = mask.to(torch.bool)
    per_layer = [function(score.float().reshape(valid.shape), valid.to(score.device), given) for score in scores]
    return torch.stack([loss.to(per_layer[0].device) for loss in per_layer]).mean()
