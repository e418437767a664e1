"""Stage 3: LoRA fine-tuning of the target model on the rows of one arm, comparable between arms.

    selectmoe finetune training.model=MODEL dataset.data_path=SELECTION arm=selected output_dir=OUT
    selectmoe finetune training.model=MODEL dataset.data_path=BASELINES arm=random seed=2 reference=SELECTION output_dir=OUT

In: a causal language model; `selected_data.jsonl` of `select` or `baseline`. Out: `adapter_model.safetensors` and
`adapter_config.json` (PEFT's LoRA), the same in `checkpoint-N/` (N: optimizer steps), `training.json` (rows, steps, learned
tokens). The plan of steps comes first (`plan`), from token counts alone; `selectmoe.finetuning` carries it out. LESS's recipe
(https://arxiv.org/abs/2402.04333, appendix) is the default.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from selectmoe import distributed, stage
from selectmoe.config import StageConfig, execution, group, identity, input_
from selectmoe.errors import UserError
from selectmoe.selection import FILE, arm_directory, read_selected

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from selectmoe.template import Encoded

STAGE = "finetune"
VERSION = 2
MATCHES = ("tokens", "steps", "rows")
CUT_AWAY = "the answer was truncated away"
NO_ANSWER = "no answer"


@dataclass
class TrainingConfig:
    """How the target model is trained."""

    model: str = input_(doc="the target model: a checkpoint folder or a hub name")
    layers: int = identity(0, doc="cut the target to its first n layers, to be quick; 0: all")
    lora_r: int = identity(128, doc="rank of the adapters")
    lora_alpha: int = identity(512, doc="scale of the adapters: alpha / r")
    lora_dropout: float = identity(0.1, doc="dropout in front of the adapters")
    target_modules: list[str] = identity(
        ["q_proj", "k_proj", "v_proj", "o_proj"], doc="names of the linear layers that get an adapter"
    )
    learning_rate: float = identity(2e-5, doc="peak learning rate; linear decay to 0")
    warmup_ratio: float = identity(0.03, doc="share of the steps in which the learning rate rises")
    epochs: int = identity(4, doc="passes over the rows (of the reference, where arms are matched)")
    batch_size: int = identity(128, doc="rows per optimizer step (global); how many are accumulated is computed")
    per_device_batch_size: int = identity(4, doc="rows per forward pass, at most batch_size; limited by memory")
    max_length: int = identity(2048, doc="tokens kept of a row")
    distributed: str = execution("single", doc="single; under torchrun ddp, or fsdp: the frozen model is sharded")


@dataclass
class DatasetConfig:
    """Where the rows are."""

    data_path: str = input_(doc="selected_data.jsonl, its folder, or a baseline's folder of many arms")


@dataclass
class FinetuneConfig(StageConfig):
    """Configuration of stage `finetune`."""

    training: TrainingConfig = group(TrainingConfig)
    dataset: DatasetConfig = group(DatasetConfig)
    reference: str = input_(
        "", doc="selection (arm selected) whose steps and tokens count for `match`; default: the rows"
    )
    arm: str = identity("selected", doc="whose rows they are; finds them in a baseline's folder")
    match: str = identity("tokens", doc="what arms have in common beside the steps: tokens (learned), steps, rows")

    def validate(self) -> None:
        """Check the values.

        Raises:
            UserError: one is out of its range, or the batch is impossible.
        """
        t = self.training
        if self.match not in MATCHES:
            raise UserError(f"match={self.match!r} is unknown; known: {', '.join(MATCHES)}")
        for name in ("lora_r", "lora_alpha", "epochs", "batch_size", "per_device_batch_size"):
            if getattr(t, name) < 1:
                raise UserError(f"training.{name}={getattr(t, name)} must be at least 1")
        if t.per_device_batch_size > t.batch_size:
            raise UserError(
                f"training.per_device_batch_size={t.per_device_batch_size} is more than training.batch_size="
                f"{t.batch_size}, the rows of a whole step: lower the first or raise the second"
            )
        if t.max_length < 2:
            raise UserError(f"training.max_length={t.max_length} must be at least 2")
        if t.layers < 0 or self.seed < 0:
            raise UserError("training.layers and seed must not be negative")
        if not 0 < t.learning_rate < math.inf:
            raise UserError(f"training.learning_rate={t.learning_rate} must be above 0")
        if not 0 <= t.lora_dropout < 1 or not 0 <= t.warmup_ratio < 1:
            raise UserError("training.lora_dropout and training.warmup_ratio must be in [0, 1)")
        if not t.target_modules:
            raise UserError("training.target_modules= is empty: name at least one linear layer, such as q_proj")
        distributed.check_mode(t.distributed)
        if not self.arm:
            raise UserError("arm= is empty: name the arm whose rows these are")


def rows_path(path: str, arm: str, seed: int) -> Path:
    """The selection of an arm: a file or one selection as it is, else the arm's folder in a baseline's.

    Raises:
        UserError: there is no such selection.
    """
    found = Path(path)
    if found.is_file() or (found / FILE).is_file():
        return found
    return arm_directory(found, arm, seed)


def learned_tokens(encoded: Encoded) -> int:
    """Tokens of a row that are learned: the assistant's, if anything stands before them."""
    return sum(encoded.answer[1:])


def usable(encoded: Sequence[Encoded]) -> tuple[list[Encoded], dict[str, int]]:
    """The rows that teach something, and reason -> number of those that do not."""
    kept = [e for e in encoded if learned_tokens(e)]
    dropped = Counter(CUT_AWAY if e.truncated else NO_ANSWER for e in encoded if not learned_tokens(e))
    return kept, dict(dropped)


def _stream(n: int, seed: int) -> Iterator[int]:
    """Row numbers without end: one permutation per pass, each with a generator of its own."""
    epoch = 0
    while True:
        yield from np.random.default_rng([seed, epoch]).permutation(n).tolist()
        epoch += 1


def plan(
    tokens: Sequence[int], reference: Sequence[int], *, batch_size: int, epochs: int, match: str, seed: int
) -> list[list[int]]:
    """The rows of every optimizer step.

    With S the reference's steps (its epochs times its rows over the batch size, rounded up) and T its learned tokens over
    all epochs, the arm's shuffled rows, repeated as often as needed, are cut into S steps: `tokens`: after step i they
    hold i/S of T, to the nearest row; `rows`: i/S of the rows that the reference sees; `steps`: batch_size rows each.

    Args:
        tokens: learned tokens of each row of the arm.
        reference: learned tokens of each row of the reference.
        batch_size: rows per step.
        epochs: passes over the reference.
        match: one of `MATCHES`.
        seed: of the order.

    Returns:
        S lists of row numbers, none of them empty.

    Raises:
        UserError: with at least one row in every step the arm's tokens exceed the reference's by more than a row.
    """
    steps = math.ceil(len(reference) / batch_size) * epochs
    stream = _stream(len(tokens), seed)
    if match == "steps":
        return [[next(stream) for _ in range(batch_size)] for _ in range(steps)]
    if match == "rows":
        borders = [(2 * i * len(reference) * epochs + steps) // (2 * steps) for i in range(steps + 1)]
        return [[next(stream) for _ in range(b - a)] for a, b in pairwise(borders)]
    total, done = sum(reference) * epochs, 0
    planned: list[list[int]] = []
    row = next(stream)
    for i in range(1, steps + 1):
        # A row belongs to the step in which its middle lies; every step has a row at least.
        batch: list[int] = []
        while not batch or (2 * done + tokens[row]) * steps <= 2 * total * i:
            batch.append(row)
            done += tokens[row]
            row = next(stream)
        planned.append(batch)
    if done - total > max(tokens):
        raise UserError(
            f"the arm's rows are too long to match the reference: {steps} steps of at least one row have {done} learned "
            f"tokens, the reference {total}; raise training.batch_size, or use match=steps"
        )
    return planned


def _encoded(path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[Encoded], dict[str, int]]:
    from selectmoe.template import encode_many

    return usable(encode_many([s.row for s in read_selected(path)], tokenizer, max_length))


def run(config: FinetuneConfig) -> Path:
    """Fine-tune.

    Returns:
        The folder of the adapter.

    Raises:
        UserError: the model or the rows are not there or not usable.
    """
    distributed.check_launch(STAGE, config.training.distributed)
    rows = rows_path(config.dataset.data_path, config.arm, config.seed)
    reference = rows_path(config.reference, "selected", config.seed) if config.reference else None
    from selectmoe import finetuning
    from selectmoe.template import load_tokenizer

    model = finetuning.find_model(config.training.model, "training.model")
    inputs = {"model": str(model), "rows": str(rows), "reference": str(reference or "")}
    with distributed.together(config.training.distributed), stage.begin(STAGE, VERSION, config, inputs) as out:
        if out.done:
            return out.path
        t = config.training
        tokenizer = load_tokenizer(model)
        kept, dropped = _encoded(rows, tokenizer, t.max_length)
        if not kept:
            raise UserError(f"no row of {rows} is left to learn from: {dropped}; is training.max_length too small?")
        measure = _encoded(reference, tokenizer, t.max_length)[0] if reference else kept
        if not measure:
            raise UserError(f"no row of the reference {reference} has an answer left at max_length {t.max_length}")
        tokens, aim = [learned_tokens(e) for e in kept], [learned_tokens(e) for e in measure]
        steps = plan(tokens, aim, batch_size=t.batch_size, epochs=t.epochs, match=config.match, seed=config.seed)
        finetuning.train(config, model, kept, steps, int(tokenizer.pad_token_id), out)
        if not out.leads:
            return out.path
        seen = [i for batch in steps for i in batch]
        summary = {
            "steps": len(steps),
            "rows_seen": len(seen),
            "learned_tokens": sum(tokens[i] for i in seen),
            "reference_learned_tokens": sum(aim) * t.epochs,
        }
        (out.staging / "training.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        bookkeeping = ("adapter_config.json", "checkpoint-*/adapter_config.json", "checkpoint-*/trainer_state.json")
        out.commit(
            rows_in=len(kept) + sum(dropped.values()), rows_out=len(kept), dropped=dropped, bookkeeping=bookkeeping
        )
    return out.path
