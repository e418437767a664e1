"""The training loop of `warmup`: gates (and routers) in float32, committed progress, exact resume.

No command runs this module. Not transformers' Trainer: an observer's gates need a forward pass of the base model without
lm_head and without a backward pass through it, over pairs of rows that are made as training goes; that is 20 lines here.
Every step's rows, order, copies and noise follow from seed, step and rows alone, so a state holds no random generator.
"""

from __future__ import annotations

import io
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from selectmoe import distributed, template
from selectmoe.corruption import corrupt
from selectmoe.device import default_dtype, deterministic, pick_device, require_finite, seed_for, set_threads
from selectmoe.errors import UserError
from selectmoe.losses import quality_loss
from selectmoe.modeling import load_judge
from selectmoe.progress import progress
from selectmoe.router_weights import router_parameters, save_router_weights

if TYPE_CHECKING:
    from selectmoe.pool import Row
    from selectmoe.stage import Output
    from selectmoe.warmup import WarmupConfig

STATE = "state.pt"
COMMIT_SECONDS = 15.0
"""A kill costs at most this much work and the step under way."""

Item = tuple[template.Encoded, int]
"""An encoded row and its label: 1 pool row, 0 corrupted copy."""


class _Root(torch.nn.Module):
    """What FSDP wraps in the model's place: it changes the class, by which transformers knows what a model can record."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


class GateTraining:
    """One training run.

    Args:
        config: of the stage.
        rows: the warm-up rows, sorted by key; those without anything to learn are dropped.
        out: the stage's output, for metrics and committed progress.

    Raises:
        UserError: no row has anything to learn.
    """

    def __init__(self, config: WarmupConfig, rows: list[Row], out: Output) -> None:
        self.config, self.out = config, out
        self.device = pick_device()
        set_threads(config.threads)
        deterministic(config.seed)
        path = config.selector_model.path
        self.tokenizer = template.load_tokenizer(path)
        self.sharded = config.training.distributed == "fsdp"
        self.model = load_judge(path, "cpu" if self.sharded else self.device, default_dtype(self.device))
        encoded = template.encode_many(rows, self.tokenizer, config.training.max_length)
        kept = [(row, e) for row, e in zip(rows, encoded, strict=True) if any(self._learned(e))]
        if not kept:
            raise UserError("no warm-up row has a token to learn: raise training.max_length")
        self.rows = [row for row, _ in kept]
        self.encoded = [e for _, e in kept]
        self.parameters = self._unfreeze()
        self.called: Any = self.model.model if config.recipe == "observer" else self.model
        if self.sharded:
            self.called = _Root(self.called)
            distributed.shard(self.called, self.model._no_split_modules, router_parameters(self.model).values())
            self.model.to(self.device)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=config.training.learning_rate, weight_decay=0.0)
        self.per_epoch = -(-len(self.rows) // config.training.batch_size)
        self.steps = self.per_epoch * config.training.epochs

    def _learned(self, encoded: template.Encoded) -> list[bool]:
        t = self.config.training
        if self.config.recipe == "observer":
            return encoded.answer
        learned = template.labels(encoded, t.full_sequence_prediction, t.mask_special_tokens)
        return [token != template.IGNORED for token in learned[1:]]

    def _unfreeze(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters, in float32; everything else is frozen."""
        self.model.requires_grad_(False)
        config, t = self.model.config, self.config.training
        config.quality_loss_type, config.quality_loss_weight = self.config.loss, t.quality_loss_weight
        config.quality_loss_params, config.enable_load_balancing = None, t.enable_load_balancing
        chosen = {}
        for name, parameter in router_parameters(self.model).items():
            if t.train_gates if ".quality_gate." in name else self.config.train_routers:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
                chosen[name] = parameter
        return chosen

    def train(self) -> None:
        """Go through all steps, from the last committed one on.

        Raises:
            UserError: the loss is no longer finite.
        """
        start = self._resume()
        weight = self.config.training.quality_loss_weight
        coefficient = 1.0 if self.config.recipe == "observer" else float(self.model.config.router_aux_loss_coef)
        self.out.metric("quality_loss_weight", weight)
        self.out.metric("quality_loss_weight/effective", coefficient * weight)
        committed = time.monotonic()
        for step in progress(range(start, self.steps), "warm-up", total=self.steps - start, unit="step"):
            rate = self.config.training.learning_rate * (1 - step / self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.zero_grad()
            numbers = self._step(step)
            if not math.isfinite(numbers["loss"]):
                raise UserError(f"the loss was {numbers['loss']} at step {step}: lower training.learning_rate")
            self.optimizer.step()
            for name, value in numbers.items():
                self.out.metric(name, value, step=step)
            if self.out.leads and time.monotonic() - committed > COMMIT_SECONDS:
                self._commit(step + 1)
                committed = time.monotonic()
        require_finite(self.parameters.values(), f"training.learning_rate={self.config.training.learning_rate}")

    def _step(self, step: int) -> dict[str, float]:
        """Gradients of one step, and what it was like."""
        compute = self._observe if self.config.recipe == "observer" else self._through
        numbers = compute(step, self._items(step))
        distributed.add_gradients(self.parameters.values())
        return distributed.add_numbers(numbers)

    def _items(self, step: int) -> list[list[Item]]:
        """The step's micro-batches: pool rows, and for `contrastive` their corrupted copies beside them."""
        t = self.config.training
        epoch, place = divmod(step, self.per_epoch)
        order = list(range(len(self.rows)))
        random.Random(f"{self.config.seed}:{epoch}").shuffle(order)
        chosen = order[place * t.batch_size : (place + 1) * t.batch_size]
        chosen.sort(key=lambda i: (len(self.encoded[i]), i))
        batches = []
        for start in range(0, len(chosen), t.per_device_batch_size):
            part = chosen[start : start + t.per_device_batch_size]
            batch = [(self.encoded[i], 1) for i in part]
            if self.config.loss == "contrastive":
                copies = [copy for i in part for copy in self._copies(i, epoch)]
                batch += [(e, 0) for e in template.encode_many(copies, self.tokenizer, t.max_length) if any(e.answer)]
            batches.append(batch)
        return batches

    def _copies(self, index: int, epoch: int) -> Iterator[Row]:
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

    def _tensors(self, items: list[Item]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """input_ids, attention mask, answer mask [B, T] and row labels [B]."""
        width = max(len(e) for e, _ in items)
        pad = self.tokenizer.pad_token_id

        def padded(values: list[list[Any]], fill: int) -> Tensor:
            return torch.tensor([list(v) + [fill] * (width - len(v)) for v in values], device=self.device)

        ids = padded([e.input_ids for e, _ in items], pad)
        mask = padded([[1] * len(e) for e, _ in items], 0)
        answer = padded([[int(a) for a in e.answer] for e, _ in items], 0)
        return ids, mask, answer, torch.tensor([label for _, label in items], device=self.device)

    def _mine(self, step: int, batches: list[list[Item]]) -> Iterator[tuple[list[Item], float]]:
        """This process's micro-batches with their weights; torch is seeded for each (the noise of a trash expert)."""
        for index, batch, weight in distributed.share(batches, lockstep=self.sharded):
            seed_for(self.config.seed, step, index)
            yield batch, weight

    def _observe(self, step: int, batches: list[list[Item]]) -> dict[str, float]:
        """The gates read what the frozen model computes: their loss needs no backward pass through it."""
        total = sum(map(len, batches))
        numbers = {"loss": 0.0, "good_ratio/pool": 0.0, "good_ratio/corrupted": 0.0}
        counts = {label: max(1, sum(mine == label for batch in batches for _, mine in batch)) for label in (0, 1)}
        for batch, weight in self._mine(step, batches):
            ids, mask, answer, labels = self._tensors(batch)
            base = self.called(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False)
            loss = quality_loss("contrastive", base.quality_score, mask, None, labels, answer)
            share = weight * len(batch) / total
            weighted: Tensor = loss * share * self.config.training.quality_loss_weight
            torch.autograd.backward(weighted)
            numbers["loss"] += float(loss.detach()) * share
            rows = _good_ratio(base.quality_score, answer)
            for label, name in ((1, "good_ratio/pool"), (0, "good_ratio/corrupted")):
                numbers[name] += weight * float(rows[labels == label].sum()) / counts[label]
        return numbers

    def _through(self, step: int, batches: list[list[Item]]) -> dict[str, float]:
        """The legacy recipe: the whole loss, through the model; the cross-entropy over the step's learned tokens."""
        t = self.config.training
        total = sum(map(len, batches))
        learned = sum(sum(self._learned(e)) for batch in batches for e, label in batch if label)
        clean = sum(label for batch in batches for _, label in batch)
        numbers = {"loss": 0.0, "loss/cross_entropy": 0.0, "loss/quality": 0.0, "good_ratio/pool": 0.0}
        self.model.train()
        for batch, weight in self._mine(step, batches):
            ids, mask, answer, row_labels = self._tensors(batch)
            width = ids.shape[1]
            targets = [template.labels(e, t.full_sequence_prediction, t.mask_special_tokens) for e, _ in batch]
            labels = torch.tensor([y + [template.IGNORED] * (width - len(y)) for y in targets], device=self.device)
            extra = {"row_labels": row_labels, "answer_mask": answer} if self.config.loss == "contrastive" else {}
            out = self.called(
                input_ids=ids,
                attention_mask=mask,
                labels=labels,
                output_router_logits=True,
                use_cache=False,
                num_items_in_batch=torch.tensor(learned, device=self.device),
                **extra,
            )
            share = weight * len(batch) / total
            loss = weight * out.ce_loss + (out.loss - out.ce_loss) * share
            torch.autograd.backward(loss)
            numbers["loss"] += float(loss.detach())
            numbers["loss/cross_entropy"] += weight * float(out.ce_loss.detach())
            numbers["loss/quality"] += float(out.quality_loss.detach()) * share
            good = float(_good_ratio(out.quality_score, mask)[row_labels == 1].sum())
            numbers["good_ratio/pool"] += weight * good / clean
        return numbers

    def _commit(self, step: int) -> None:
        buffer = io.BytesIO()
        weights = {name: p.detach().cpu() for name, p in self.parameters.items()}
        torch.save({"step": step, "weights": weights, "optimizer": self.optimizer.state_dict()}, buffer)
        self.out.keep_metrics()
        self.out.work.put_bytes(STATE, buffer.getvalue())

    def _resume(self) -> int:
        data = distributed.from_first(lambda: self.out.work.get(STATE))
        if data is None:
            return 0
        state = torch.load(io.BytesIO(data), map_location=self.device, weights_only=True)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])

    def save(self, directory: Path) -> None:
        """Write the router weights in both forms, and the tokenizer."""
        save_router_weights(self.model.eval(), directory, self.tokenizer)


@torch.no_grad()
def _good_ratio(scores: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """Mean g per row over layers and the tokens of a mask [B, T]: [B]."""
    good = torch.stack([s.squeeze(-1).sigmoid() for s in scores]).mean(0)
    return (good * mask).sum(1) / mask.sum(1).clamp(min=1)
