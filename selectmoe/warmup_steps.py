"""The plan of warm-up: which rows, corrupted copies and paddings make up every step, from seed and rows alone.

No command runs this module. `contrastive` puts corrupted copies beside the pool rows, made anew in every epoch as training
goes. Nothing here has a state: step n of a resumed run, or of another number of processes, is the same step n.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from selectmoe import template
from selectmoe.corruption import corrupt
from selectmoe.errors import UserError

if TYPE_CHECKING:
    from selectmoe.pool import Row
    from selectmoe.warmup import WarmupConfig

GROUPED_STEPS = 16
"""`group_by_length` sorts the rows of so many steps: long enough to save padding, short enough to stay mixed."""


@dataclass(frozen=True, slots=True)
class Item:
    """A row of a batch: its tokens, its label (1 pool row, 0 corrupted copy), and whose it is."""

    encoded: template.Encoded
    label: int
    row: str


@dataclass(frozen=True, slots=True)
class Batch:
    """What goes through the model at once, padded on the right.

    Attributes:
        ids: [B, T] int64.
        mask: [B, T], 1 on valid tokens.
        answer: [B, T], 1 on answer tokens.
        rows: [B], the rows' labels: 1 pool row, 0 corrupted copy.
        labels: [B, T], what the cross-entropy learns, -100 elsewhere; None where it is not computed.
    """

    ids: Tensor
    mask: Tensor
    answer: Tensor
    rows: Tensor
    labels: Tensor | None


class Plan:
    """The rows with something to learn, and the steps over them.

    Args:
        config: of the stage.
        rows: sorted by key; those without anything to learn are left out.
        tokenizer: of the checkpoint.
        what: the rows' name in messages.

    Raises:
        UserError: no row has anything to learn.
    """

    def __init__(self, config: WarmupConfig, rows: Sequence[Row], tokenizer: Any, what: str = "warm-up row") -> None:
        self.config, self.tokenizer = config, tokenizer
        t = config.training
        encoded = template.encode_many(rows, tokenizer, t.max_length)
        kept = [(row, e) for row, e in zip(rows, encoded, strict=True) if self.learned(e)]
        if not kept:
            raise UserError(f"no {what} has a token to learn: raise training.max_length")
        self.rows = [row for row, _ in kept]
        self.encoded = [e for _, e in kept]
        self.per_epoch = -(-len(self.rows) // t.batch_size)
        self.steps = self.per_epoch * t.epochs
        self._epoch = lru_cache(maxsize=2)(self._order)

    def learned(self, encoded: template.Encoded) -> int:
        """Tokens of a row that pull on what is trained: those of the cross-entropy, or where it plays no part the loss's."""
        t = self.config.training
        if not self.config.through:
            return sum(encoded.answer) if self.config.loss == "contrastive" else len(encoded)
        learned = template.labels(encoded, t.full_sequence_prediction, t.mask_special_tokens)
        return sum(token != template.IGNORED for token in learned[1:])

    def _order(self, epoch: int) -> list[list[int]]:
        """The rows of every step of an epoch."""
        size = self.config.training.batch_size
        order = list(range(len(self.rows)))
        rng = random.Random(f"{self.config.seed}:{epoch}")
        rng.shuffle(order)
        if self.config.training.group_by_length:
            parts = (
                order[start : start + GROUPED_STEPS * size] for start in range(0, len(order), GROUPED_STEPS * size)
            )
            order = [i for part in parts for i in sorted(part, key=lambda i: -len(self.encoded[i]))]  # ties by chance
        steps = [order[start : start + size] for start in range(0, len(order), size)]
        if self.config.training.group_by_length:
            rng.shuffle(steps)
        return steps

    def step(self, step: int) -> list[list[Item]]:
        """The step's micro-batches, the longest rows first (what does not fit into memory fails at once)."""
        epoch, place = divmod(step, self.per_epoch)
        return self.batches(self._epoch(epoch)[place], str(epoch))

    def batches(self, rows: Sequence[int], epoch: str) -> list[list[Item]]:
        """Some rows in micro-batches, each row with its corrupted copies beside it.

        Args:
            rows: positions in `self.rows`.
            epoch: what the copies' chance depends on beside the row.
        """
        t = self.config.training
        groups = self._groups(sorted(rows, key=lambda i: (-len(self.encoded[i]), i)), epoch)
        out: list[list[Item]] = []
        pool_rows = longest = 0
        for group in groups:
            tokens = max(len(item.encoded) for item in group)
            full = pool_rows == t.per_device_batch_size
            if t.token_budget and out:
                full = (len(out[-1]) + len(group)) * max(longest, tokens) > t.token_budget
            if not out or full:
                out.append([])
                pool_rows = longest = 0
            out[-1] += group
            pool_rows, longest = pool_rows + 1, max(longest, tokens)
        return out

    def _groups(self, rows: Sequence[int], epoch: str) -> list[list[Item]]:
        """Each row with its copies; all copies go through the tokenizer in one call."""
        groups = [[Item(self.encoded[i], 1, self._name(i))] for i in rows]
        if self.config.loss == "contrastive":
            copies = [(at, copy) for at, i in enumerate(rows) for copy in self._copies(i, epoch)]
            length = self.config.training.max_length
            encoded = template.encode_many((copy for _, copy in copies), self.tokenizer, length)
            for (at, _), e in zip(copies, encoded, strict=True):
                if any(e.answer):
                    groups[at].append(Item(e, 0, groups[at][0].row))
        return groups

    def _name(self, index: int) -> str:
        return f"{self.rows[index].dataset}:{self.rows[index].id}"

    def _copies(self, index: int, epoch: str) -> Iterator[Row]:
        """Corrupted copies of one row; the kind is drawn, and the next one taken where it would not change the row."""
        t = self.config.training
        for n in range(t.ratio):
            rng = random.Random(f"{self.config.seed}:{epoch}:{index}:{n}")
            first = rng.randrange(len(t.corruptions))
            for kind in t.corruptions[first:] + t.corruptions[:first]:
                donor = self.rows[rng.randrange(len(self.rows))]
                copy = corrupt(kind, self.rows[index], donor, rng)
                if copy is not None:
                    yield copy
                    break

    def tensors(self, items: Sequence[Item], device: torch.device) -> Batch:
        """The items, padded on the right."""
        width = max(len(item.encoded) for item in items)
        t = self.config.training

        def padded(values: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([[*v, *[fill] * (width - len(v))] for v in values], device=device)

        encoded = [item.encoded for item in items]
        labels = None
        if self.config.through:
            learned = [template.labels(e, t.full_sequence_prediction, t.mask_special_tokens) for e in encoded]
            labels = padded(learned, template.IGNORED)
        return Batch(
            padded([e.input_ids for e in encoded], self.tokenizer.pad_token_id),
            padded([[1] * len(e) for e in encoded], 0),
            padded([[int(a) for a in e.answer] for e in encoded], 0),
            torch.tensor([item.label for item in items], device=device),
            labels,
        )
