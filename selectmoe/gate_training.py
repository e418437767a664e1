"""The training loop of `warmup`: gates (and routers) in float32, committed progress, exact resume.

No command runs this module. Not transformers' Trainer: an observer's gates need a forward pass of the base model without
lm_head and without a backward pass through it, over pairs of rows that are made as training goes; that is 20 lines here.
Every step's rows, order, copies, noise and learning rate follow from seed, step and rows alone, so a state holds no random
generator, scheduler or position but the step.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from selectmoe import distributed, template
from selectmoe.device import default_dtype, deterministic, pick_device, require_finite, seed_for, set_threads
from selectmoe.errors import UserError
from selectmoe.frozen import frozen_digest, frozen_tensors
from selectmoe.gate_history import GateHistory
from selectmoe.judge_adapters import add_adapters, save_adapters
from selectmoe.loss_parameters import check_loss
from selectmoe.losses import quality_loss
from selectmoe.modeling import load_judge
from selectmoe.progress import progress
from selectmoe.router_weights import router_parameters, save_router_weights
from selectmoe.schedule import learning_rate
from selectmoe.warmup_steps import Batch, Item, Plan

if TYPE_CHECKING:
    from selectmoe.pool import Row
    from selectmoe.stage import Output
    from selectmoe.warmup import WarmupConfig

STATE = "state.pt"
COMMIT_SECONDS = 15.0
"""A kill costs at most this much work and the step under way."""
NAMED_ROWS = 10
"""Row ids in the message of a training that diverged, at most."""
GATE = "gate/"
"""Prefix of the numbers that go into the history and not into the metrics."""


class _Root(nn.Module):
    """What FSDP wraps in the model's place: it changes the class, by which transformers knows what a model can record."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


@dataclass(frozen=True)
class Parts:
    """The losses of a micro-batch, unweighted, and the raw scores per layer; None where a part plays no part."""

    cross_entropy: Tensor | None
    quality: Tensor
    load_balancing: Tensor | None
    scores: Sequence[Tensor]

    def finite(self) -> bool:
        """Whether all of it is."""
        losses = (self.cross_entropy, self.quality, self.load_balancing)
        return all(bool(part.isfinite().all()) for part in (*losses, *self.scores) if part is not None)


class GateTraining:
    """One training run.

    Args:
        config: of the stage.
        rows: the warm-up rows, sorted by key; those without anything to learn are dropped.
        held: rows to evaluate on; none: no evaluation.
        out: the stage's output, for metrics and committed progress.

    Raises:
        UserError: no row has anything to learn.
    """

    def __init__(self, config: WarmupConfig, rows: list[Row], held: list[Row], out: Output) -> None:
        self.config, self.out = config, out
        self.device = pick_device()
        set_threads(config.threads)
        deterministic(config.seed)
        path, t = config.selector_model.path, config.training
        self.tokenizer = template.load_tokenizer(path)
        self.plan = Plan(config, rows, self.tokenizer)
        self.held = Plan(config, held, self.tokenizer, "held-out row") if held else None
        self.sharded = t.distributed == "fsdp"
        dtypes = {"auto": default_dtype(self.device), "bfloat16": torch.bfloat16}
        place, dtype = "cpu" if self.sharded else self.device, dtypes.get(t.precision, torch.float32)
        self.model = load_judge(path, place, dtype, config.selector_model.trash_expert)
        self.loss_params = check_loss(config.loss, t.quality_loss_params)
        self.coefficient = float(self.model.config.router_aux_loss_coef) if config.through else 1.0
        whole = list(router_parameters(self.model).values())
        self.parameters = self._unfreeze()
        if t.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.called: Any = self.model if config.through else self.model.model
        if self.sharded:
            self.called = _Root(self.called)
            distributed.shard(self.called, self.model._no_split_modules, [*whole, *self.parameters.values()])
            self.model.to(self.device)
        trained = self.parameters.values()
        self.optimizer = torch.optim.AdamW(trained, lr=t.learning_rate, weight_decay=t.weight_decay)
        self.history = GateHistory(self.plan.steps, self.model.config.num_hidden_layers)
        self.bad: list[str] = []
        self.proof: dict[str, Any] = {}

    def _unfreeze(self) -> dict[str, nn.Parameter]:
        """The trained parameters, in float32; everything else is frozen."""
        self.model.requires_grad_(False)
        config, t = self.model.config, self.config.training
        config.quality_loss_type, config.quality_loss_params = self.config.loss, dict(t.quality_loss_params)
        config.quality_loss_weight, config.enable_load_balancing = t.quality_loss_weight, t.enable_load_balancing
        if self.config.lora:
            return add_adapters(self.model, self.config)
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
            RuntimeError: something changed that is frozen.
        """
        start, steps, t = self._resume(), self.plan.steps, self.config.training
        before = frozen_digest(self.model)
        if not start:
            self._evaluate(0)
        committed = time.monotonic()
        for step in progress(range(start, steps), "warm-up", total=steps - start, unit="step"):
            rate = learning_rate(step, steps, t.learning_rate, t.warmup_ratio, t.scheduler)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.zero_grad()
            numbers = self._step(step)
            numbers["gradient_norm"] = self._clip()
            self._check(step, numbers)
            self.optimizer.step()
            self._note(step, numbers | {"learning_rate": rate})
            if (step + 1) % (t.eval_every or self.plan.per_epoch) == 0 or step + 1 == steps:
                self._evaluate(step + 1)
            if self.out.leads and step + 1 < steps and time.monotonic() - committed > COMMIT_SECONDS:
                self._commit(step + 1)
                committed = time.monotonic()
        require_finite(self.parameters.values(), f"training.learning_rate={t.learning_rate}")
        self._prove(before)

    def _step(self, step: int) -> dict[str, float]:
        """Gradients of one step, and what it was like."""
        if self.config.through:
            self.model.train()
        numbers = self._gradients(step, self.plan.step(step))
        distributed.add_gradients(self.parameters.values())
        return distributed.add_numbers(numbers)

    def _gradients(self, step: int, batches: list[list[Item]]) -> dict[str, float]:
        """Add up the gradients of this process's micro-batches; their numbers."""
        weigh = _Weights(self, batches)
        numbers: dict[str, float] = dict.fromkeys(self._names(), 0.0)
        for items, weight in self._mine(step, batches):
            batch = self.plan.tensors(items, self.device)
            parts = self._parts(batch, weigh.learned)
            loss, values = weigh.total(parts, items, weight)
            torch.autograd.backward(loss)
            if weight and not math.isfinite(values["loss"]):
                self.bad += self._blame(items)
            for name, value in (values | weigh.gates(parts, batch, weight)).items():
                numbers[name] += value
            numbers["tokens"] += weight * float(batch.mask.sum())
            numbers["tokens/padded"] += weight * batch.mask.numel()
        return numbers

    def _names(self) -> list[str]:
        """What a step counts, the same in every process."""
        names = ["loss", "loss/quality", "good_ratio/pool", "tokens", "tokens/padded"]
        names += ["loss/cross_entropy"] if self.config.through else []
        names += ["loss/load_balancing"] if self.config.training.enable_load_balancing else []
        names += ["good_ratio/corrupted"] if self.config.loss == "contrastive" else []
        return names + [f"{GATE}{i}" for i in range(self.model.config.num_hidden_layers)]

    def _mine(self, step: int, batches: list[list[Item]]) -> Iterator[tuple[list[Item], float]]:
        """This process's micro-batches with their weights; torch is seeded for each (noise of a trash expert, dropout)."""
        for index, batch, weight in distributed.share(batches, lockstep=self.sharded):
            seed_for(self.config.seed, step, index)
            yield batch, weight

    def _parts(self, batch: Batch, learned: int) -> Parts:
        """The losses of a micro-batch.

        Where gates alone are trained they read what the frozen model computes: there is no graph through the model, whose
        hidden states are detached before a gate. Else the whole loss goes through it.
        """
        inputs: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.mask}
        mixed = self.config.training.precision == "mixed"
        with torch.autocast(self.device.type, torch.bfloat16) if mixed else contextlib.nullcontext():
            if not self.config.through:
                base = self.called(**inputs, output_router_logits=True, use_cache=False)
                scores = base.quality_score
                loss = quality_loss(self.config.loss, scores, batch.mask, self.loss_params, batch.rows, batch.answer)
                return Parts(None, loss, None, scores)
            extra = {"row_labels": batch.rows, "answer_mask": batch.answer} if self.config.loss == "contrastive" else {}
            items = torch.tensor(learned, device=self.device)
            inputs |= {"labels": batch.labels, "num_items_in_batch": items} | extra
            out = self.called(**inputs, output_router_logits=True, use_cache=False)
        balance = out.aux_loss if self.config.training.enable_load_balancing else None
        return Parts(out.ce_loss, out.quality_loss, balance, out.quality_score)

    def _clip(self) -> float:
        """Scale the gradients down where they are too long; returns their length before that."""
        limit = self.config.training.max_grad_norm or math.inf
        return float(nn.utils.clip_grad_norm_(self.parameters.values(), limit))

    def _check(self, step: int, numbers: dict[str, float]) -> None:
        """Raise `UserError` where loss or gradients are not finite, and name the rows; said by every process."""
        if math.isfinite(numbers["loss"]) and math.isfinite(numbers["gradient_norm"]):
            return
        names = sorted(set(distributed.collect(self.bad)))
        names = names or sorted({item.row for batch in self.plan.step(step) for item in batch})
        shown = ", ".join(names[:NAMED_ROWS]) + (f" and {len(names) - NAMED_ROWS} more" if names[NAMED_ROWS:] else "")
        what = "loss" if not math.isfinite(numbers["loss"]) else "gradient"
        raise UserError(f"the {what} is not finite at step {step}, rows {shown}: lower training.learning_rate")

    def _blame(self, items: list[Item]) -> list[str]:
        """The rows of a micro-batch that are not finite by themselves, else all; a sharded model can only say all."""
        names = [item.row for item in items]
        if self.sharded:
            return names
        with torch.no_grad():
            alone = [self._parts(self.plan.tensors([item], self.device), 1).finite() for item in items]
        return [name for name, good in zip(names, alone, strict=True) if not good] or names

    def _note(self, step: int, numbers: dict[str, float]) -> None:
        """Record what a step was like: the losses' parts, their weights in force, the gates by layer."""
        layers = [numbers.pop(name) for name in [n for n in numbers if n.startswith(GATE)]]
        self.history.set(step, layers)
        weight = self.config.training.quality_loss_weight
        numbers |= {"quality_loss_weight": weight, "quality_loss_weight/effective": self.coefficient * weight}
        if self.config.training.enable_load_balancing:
            numbers["load_balancing_weight/effective"] = self.coefficient
        for name, value in numbers.items():
            self.out.metric(name, value, step=step)

    @torch.no_grad()
    def _evaluate(self, step: int) -> None:
        """Losses and gates on the held-out rows, and for `contrastive` how well they tell them from corrupted copies."""
        if self.held is None:
            return
        self.model.eval()
        batches = self.held.batches(range(len(self.held.rows)), "held out")
        weigh = _Weights(self, batches)
        numbers: dict[str, float] = dict.fromkeys(self._names(), 0.0)
        scored: list[tuple[int, float]] = []
        for items, weight in self._mine(-1, batches):
            batch = self.held.tensors(items, self.device)
            parts = self._parts(batch, weigh.learned)
            _, values = weigh.total(parts, items, weight)
            for name, value in (values | weigh.gates(parts, batch, weight)).items():
                numbers[name] += value
            if weight:
                good = weigh.good_ratio(parts, batch).mean(0).tolist()
                scored += [(item.label, value) for item, value in zip(items, good, strict=True)]
        numbers = distributed.add_numbers(numbers)
        if self.config.loss == "contrastive":
            numbers["auc"] = _auc(distributed.collect(scored))
        for name, value in numbers.items():
            if not name.startswith((GATE, "tokens")):
                self.out.metric(f"eval/{name}", value, step=step)

    def _commit(self, step: int) -> None:
        """Keep the state after so many steps: one file, whole or not there."""
        buffer = io.BytesIO()
        weights = {name: p.detach().cpu() for name, p in self.parameters.items()}
        state = {"step": step, "weights": weights, "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"gates": self.history.state(step)}, buffer)
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
        self.history.restore(state["gates"])
        return int(state["step"])

    def _prove(self, before: str) -> None:
        """Compare the digest of what is frozen, and note what was trained."""
        distributed.put_back(self.called)
        after, frozen = frozen_digest(self.model), frozen_tensors(self.model)
        if after != before:
            raise RuntimeError(f"the training changed a frozen tensor: their digest was {before}, it is {after}")
        self.proof = {
            "recipe": self.config.recipe,
            "loss": {"name": self.config.loss, "params": self.loss_params, "weight": self.coefficient},
            "steps": self.plan.steps,
            "micro_batches_per_process": -(-len(self.plan.step(0)) // distributed.world()),
            "trained": {name: list(p.shape) for name, p in self.parameters.items()},
            "frozen": {"tensors": len(frozen), "sha256_before": before, "sha256_after": after},
        }
        self.proof["loss"]["weight"] *= self.config.training.quality_loss_weight

    def save(self, directory: Path) -> None:
        """Write what was trained, the tokenizer, and what is to be known about it."""
        if self.config.lora:
            save_adapters(self.model, directory)
            self.tokenizer.save_pretrained(directory)
        else:
            save_router_weights(self.model.eval(), directory, self.tokenizer)
        self.history.write(directory)
        text = json.dumps(self.proof, indent=1, sort_keys=True)
        (directory / "warmup.json").write_text(text + "\n", encoding="utf-8")


class _Weights:
    """How much each micro-batch counts in a step, so that it is one mean however it is cut.

    The cross-entropy is normalised by the step's learned tokens, a loss that is a mean over rows by rows, one over tokens by
    tokens. Those that are not linear are averaged over the micro-batches by rows.
    """

    def __init__(self, training: GateTraining, batches: list[list[Item]]) -> None:
        config = training.config
        self.coefficient, self.weight = training.coefficient, config.training.quality_loss_weight
        self.by_token = training.loss_params.get("sample_wise_averaging") is False
        self.answers = config.loss == "contrastive"
        items = [item for batch in batches for item in batch]
        self.learned = sum(training.plan.learned(item.encoded) for item in items if item.label)
        self.rows, self.tokens = len(items), sum(len(item.encoded) for item in items)
        self.counts = {label: max(1, sum(item.label == label for item in items)) for label in (0, 1)}

    def total(self, parts: Parts, items: list[Item], weight: float) -> tuple[Tensor, dict[str, float]]:
        """What is differentiated of one micro-batch, and its numbers."""
        rows = weight * len(items) / self.rows
        tokens = weight * sum(len(item.encoded) for item in items) / self.tokens
        share = tokens if self.by_token else rows
        loss = self.coefficient * self.weight * share * parts.quality
        numbers = {"loss/quality": share * float(parts.quality.detach())}
        if parts.cross_entropy is not None:
            loss = loss + weight * parts.cross_entropy
            numbers["loss/cross_entropy"] = weight * float(parts.cross_entropy.detach())
        if parts.load_balancing is not None:
            loss = loss + self.coefficient * rows * parts.load_balancing
            numbers["loss/load_balancing"] = rows * float(parts.load_balancing.detach())
        return loss, numbers | {"loss": float(loss.detach())}

    @torch.no_grad()
    def good_ratio(self, parts: Parts, batch: Batch) -> Tensor:
        """[L, B]: mean g of every layer and row, over the tokens that the loss is taken from."""
        mask = batch.answer if self.answers else batch.mask
        good = torch.stack([s.squeeze(-1).sigmoid() for s in parts.scores])
        return (good * mask).sum(-1) / mask.sum(-1).clamp(min=1)

    def gates(self, parts: Parts, batch: Batch, weight: float) -> dict[str, float]:
        """This micro-batch's part in the mean g of pool rows and of corrupted copies, and by layer."""
        good = self.good_ratio(parts, batch)
        layers = (weight * good[:, batch.rows == 1].sum(1) / self.counts[1]).tolist()
        numbers = {f"{GATE}{i}": value for i, value in enumerate(layers)}
        numbers["good_ratio/pool"] = sum(layers) / len(layers)
        if self.answers:
            copies = good[:, batch.rows == 0].mean(0).sum() / self.counts[0]
            numbers["good_ratio/corrupted"] = weight * float(copies)
        return numbers


def _auc(scored: list[tuple[int, float]]) -> float:
    """Probability that a pool row's score is above a corrupted copy's (ties count half)."""
    pool = torch.tensor([value for label, value in scored if label])
    copies = torch.tensor([value for label, value in scored if not label])
    if not len(pool) or not len(copies):
        return math.nan
    above = (pool[:, None] > copies).double() + 0.5 * (pool[:, None] == copies).double()
    return float(above.mean())
