"""The torch side of fine-tuning and evaluation: load the target model, predict answers only, train LoRA adapters.

No command runs this module; `finetune` and `evaluate` do. An explicit loop and not transformers' Trainer: steps hold a
planned number of tokens rather than of rows, micro-batches are sorted by length, the vocabulary's matrix is multiplied with
learned positions only, and a resumed run must give the same bytes (each micro-batch is seeded by its number, so that there
is no random state to restore).
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from selectmoe import distributed
from selectmoe.checkpoint import METADATA, resolve
from selectmoe.device import default_dtype, deterministic, pick_device, require_finite, seed_for, set_threads
from selectmoe.errors import UserError
from selectmoe.progress import progress
from selectmoe.schedule import learning_rate
from selectmoe.template import Encoded

if TYPE_CHECKING:
    from selectmoe.finetune import FinetuneConfig, TrainingConfig
    from selectmoe.stage import Output

SAVE_SECONDS = 20.0
"""A kill costs at most this much work (and one step)."""

MAX_GRAD_NORM = 1.0
WEIGHTS = "adapter_model.safetensors"
RECORD = "record.json"


def find_model(model: str, key: str) -> Path:
    """The folder of a target model: a local one, or the hub's snapshot of a name.

    Args:
        model: a folder or ``OWNER/NAME``.
        key: the configuration key that named it, for messages.

    Raises:
        UserError: there is nothing.
    """
    if Path(model).is_dir():
        return Path(model)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return resolve(model, tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), key).path


def load_model(path: Path, layers: int, dtype: torch.dtype, device: torch.device) -> Any:
    """A causal language model, cut to its first `layers` layers (0: all of them), in eval mode.

    Raises:
        UserError: there is no such model at `path`, or it has fewer layers.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a causal language model: {str(error).strip().splitlines()[0]}") from None
    if layers:
        decoder = model.get_decoder()
        if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
            raise UserError(
                f"{path} ({type(model).__name__}) keeps its layers elsewhere and cannot be cut: use layers=0"
            )
        if layers > len(decoder.layers):
            raise UserError(f"layers={layers}, but {path} has {len(decoder.layers)}")
        decoder.layers = decoder.layers[:layers]
        model.config.num_hidden_layers = layers
    return model.to(device).eval()


def by_length(encoded: Sequence[Encoded], rows: Sequence[int], batch_size: int) -> list[list[int]]:
    """`rows` in batches of similar length, the longest first (what does not fit into memory fails at once)."""
    order = sorted(rows, key=lambda i: (-len(encoded[i]), i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pad(
    encoded: Sequence[Encoded], learned: Sequence[list[bool]], pad_id: int, device: torch.device
) -> dict[str, Tensor]:
    """Pad rows on the right.

    Args:
        encoded: B rows, T the longest.
        learned: for each row, which of its tokens are to be predicted.
        pad_id: token of the padding.
        device: where to.

    Returns:
        input_ids and attention_mask [B, T] int64; `predicts` [B, T] bool: positions whose *next* token is to be predicted;
        `targets` [n] int64: those next tokens, row by row.
    """
    width = max(len(e) for e in encoded)
    ids = torch.full((len(encoded), width), pad_id)
    mask = torch.zeros_like(ids)
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    for i, (e, chosen) in enumerate(zip(encoded, learned, strict=True)):
        ids[i, : len(e)] = torch.tensor(e.input_ids)
        mask[i, : len(e)] = 1
        wanted[i, : len(e)] = torch.tensor(chosen)
    predicts = functional.pad(wanted[:, 1:], (0, 1))
    batch = {"input_ids": ids, "attention_mask": mask, "predicts": predicts, "targets": ids[:, 1:][wanted[:, 1:]]}
    return {name: tensor.to(device) for name, tensor in batch.items()}


@contextmanager
def _head_at(model: Any, positions: Tensor) -> Iterator[None]:
    """Let the model's output layer see only these positions [B, T], as one row [1, n, H].

    A hook on the layer and not a call of it, so that what a model does around it (scaling, soft caps) stays.
    """

    def pick(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][positions].unsqueeze(0), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def answer_nll(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """[n] float32: negative log-likelihood, in nats, of every token of a padded batch that is to be predicted."""
    with _head_at(model, batch["predicts"]):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return functional.cross_entropy(logits[0].float(), batch["targets"], reduction="none")


def add_adapters(model: Any, training: TrainingConfig, seed: int) -> Any:
    """The model with fresh LoRA adapters, float32 and seeded.

    Raises:
        UserError: a target module does not exist; lists the linear layers that do.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    names = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if unknown := sorted(set(training.target_modules) - names):
        raise UserError(f"training.target_modules: the model has no {unknown[0]}; it has {', '.join(sorted(names))}")
    lora = LoraConfig(
        r=training.lora_r,
        lora_alpha=training.lora_alpha,
        lora_dropout=training.lora_dropout,
        target_modules=sorted(training.target_modules),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


class Trainer:
    """LoRA parameters, AdamW, and how both are committed to and restored from the stage's work."""

    def __init__(self, model: Any, peak: float) -> None:
        self.model = model
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=peak, weight_decay=0.0)

    def step(self, batches: Iterable[tuple[dict[str, Tensor], float]], total: int, rate: float) -> float:
        """One optimizer step.

        Args:
            batches: this process's micro-batches, each with its weight.
            total: learned tokens of the whole step.
            rate: the learning rate.

        Returns:
            The mean loss over the step's learned tokens, in nats.
        """
        loss = 0.0
        for batch, weight in batches:
            part = answer_nll(self.model, batch).sum() * weight / total
            part.backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach())
        distributed.add_gradients(self.parameters.values())
        nn.utils.clip_grad_norm_(self.parameters.values(), MAX_GRAD_NORM)
        for entry in self.optimizer.param_groups:
            entry["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return distributed.add_numbers({"loss": loss})["loss"]

    def save(self, out: Output, done: int, losses: list[float]) -> None:
        """Commit the state after `done` steps; the record is written last and says which file counts."""
        from safetensors.torch import save_file

        state: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            moments = self.optimizer.state[p]
            state |= {f"p.{name}": p.detach(), f"m.{name}": moments["exp_avg"], f"v.{name}": moments["exp_avg_sq"]}
        name, file = f"state-{done}.safetensors", out.path / ".work" / "state.part"
        save_file({k: t.cpu().contiguous() for k, t in state.items()}, file)
        out.work.put_file(name, file)
        file.unlink()
        out.work.put_bytes(RECORD, json.dumps({"state": name, "done": done, "losses": losses}).encode())
        for old in out.work.names():
            if old not in (name, RECORD):
                out.work.delete(old)

    def restore(self, out: Output) -> list[float]:
        """Take up the committed state; returns the losses of the steps that it contains.

        The first process reads it and gives it to the others, and the fresh parameters where there is none.
        """
        found, state = _committed(out) if out.leads else ({}, {})
        record: dict[str, Any] = distributed.from_first(lambda: found)
        with torch.no_grad():
            for name, p in self.parameters.items():
                if state:
                    p.copy_(state[f"p.{name}"])
                distributed.copy_first([p.data])
                if not record:
                    continue
                first, second = (
                    state[f"{key}.{name}"].to(p.device) if state else torch.empty_like(p.data) for key in "mv"
                )
                distributed.copy_first([first, second])
                step = torch.tensor(float(record["done"]))
                self.optimizer.state[p] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
        return [float(loss) for loss in record.get("losses", [])]


def _committed(out: Output) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record and the tensors of what was committed last; empty where nothing was."""
    from safetensors.torch import load_file

    record: dict[str, Any] = json.loads(out.work.get(RECORD) or b"{}")
    file = out.path / ".work" / "state.part"
    if not record or not out.work.fetch(record["state"], file):
        return {}, {}
    state = load_file(file)
    file.unlink()
    return record, state


def train(
    config: FinetuneConfig,
    path: Path,
    encoded: Sequence[Encoded],
    steps: Sequence[Sequence[int]],
    pad_id: int,
    out: Output,
) -> None:
    """Carry out a plan and write the adapter into the output's staging folder.

    Args:
        config: the stage's configuration.
        path: folder of the target model.
        encoded: the arm's rows.
        steps: row numbers of every optimizer step.
        pad_id: token of the padding.
        out: the stage's output.

    Raises:
        UserError: the model cannot be loaded, cut or adapted.
    """
    from selectmoe.finetune import learned_tokens

    t = config.training
    set_threads(config.threads)
    deterministic(config.seed)
    device, sharded = pick_device(), t.distributed == "fsdp"
    place = torch.device("cpu") if sharded else device
    model = add_adapters(load_model(path, t.layers, default_dtype(device), place), t, config.seed).train()
    if sharded:
        target = model.get_base_model()
        distributed.shard(target, target._no_split_modules, [p for p in model.parameters() if p.requires_grad])
        model.to(device)
    trainer = Trainer(model, t.learning_rate)
    losses = trainer.restore(out)

    def mine(step: int, micro: Sequence[Sequence[int]]) -> Iterator[tuple[dict[str, Tensor], float]]:
        for index, rows, weight in distributed.share(micro, lockstep=sharded):
            seed_for(config.seed, step, index)  # its dropout
            chosen = [encoded[j] for j in rows]
            yield pad(chosen, [e.answer for e in chosen], pad_id, device), weight

    epoch, saved, started = len(steps) // t.epochs, time.monotonic(), len(losses)
    for i, loss in enumerate(losses):
        out.metric("finetune/loss", loss, step=i + 1)
    for i in progress(range(started, len(steps)), f"finetune {config.arm}:{config.seed}", unit="step"):
        micro = by_length(encoded, steps[i], t.per_device_batch_size)
        total = sum(learned_tokens(encoded[j]) for j in steps[i])
        rate = learning_rate(i, len(steps), t.learning_rate, t.warmup_ratio)
        losses.append(trainer.step(mine(i, micro), total, rate))
        if not math.isfinite(losses[-1]):
            raise UserError(f"the loss is not finite at step {i + 1}: lower training.learning_rate={t.learning_rate}")
        out.metric("finetune/loss", losses[-1], step=i + 1)
        late = time.monotonic() - saved > SAVE_SECONDS
        if out.leads and i + 1 < len(steps) and (late or (i + 1) % epoch == 0):
            trainer.save(out, i + 1, losses)
            saved = time.monotonic()
    require_finite(trainer.parameters.values(), f"training.learning_rate={t.learning_rate}")
    if out.leads:
        write_adapter(model, out.staging, len(steps), losses)


def write_adapter(model: Any, directory: Path, steps: int, losses: Sequence[float]) -> None:
    """Write PEFT's two files, and the same as `checkpoint-N/` with the losses in trainer_state.json."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in sorted(state.items())}, directory / WEIGHTS, metadata=METADATA
    )
    lora = model.peft_config["default"]
    lora.target_modules, lora.inference_mode = sorted(lora.target_modules), True
    lora.save_pretrained(str(directory))
    checkpoint = directory / f"checkpoint-{steps}"
    checkpoint.mkdir()
    for name in (WEIGHTS, "adapter_config.json"):
        shutil.copyfile(directory / name, checkpoint / name)
    history = [{"step": i, "loss": loss} for i, loss in enumerate(losses, 1)]
    content = json.dumps({"global_step": steps, "max_steps": steps, "log_history": history}, indent=1)
    (checkpoint / "trainer_state.json").write_text(content + "\n", encoding="utf-8")


def load_adapter(model: Any, directory: Path) -> Any:
    """The model with a trained adapter merged into its weights.

    Raises:
        UserError: there is no adapter at `directory`, or it does not belong to such a model (with as many layers).
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    if not (directory / WEIGHTS).is_file() or not (directory / "adapter_config.json").is_file():
        raise UserError(f"adapters={directory} holds no {WEIGHTS} with its adapter_config.json: finetune writes them")
    try:
        adapted = PeftModel.from_pretrained(model, str(directory))
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the adapter {directory} does not fit the model: {reason}") from None
    with safe_open(str(directory / WEIGHTS), framework="pt") as file:
        theirs = set(file.keys())
    if differs := sorted(theirs ^ set(get_peft_model_state_dict(adapted, save_embedding_layers=False))):
        raise UserError(
            f"the adapter {directory} was trained for another model, or another number of layers ({len(differs)} of its "
            f"tensors do not match, such as {differs[0]}): give evaluate the layers= of the fine-tuning"
        )
    return adapted.merge_and_unload()
