"""A small OLMoE of the user's own, trained from nothing on a pool: to try things with, not to judge with.

    selectmoe pretrain data=out/ingest output_dir=out/pretrain

In: a pool, and a tokenizer where one is given. Out: an `olmoe` checkpoint with that tokenizer, or with a byte-level BPE
tokenizer that was trained on the same texts.
"""

from __future__ import annotations

import io
import math
import random
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selectmoe import checkpoint, pool, stage, template
from selectmoe.config import StageConfig, identity, input_
from selectmoe.errors import UserError

if TYPE_CHECKING:
    from selectmoe.stage import Output

STAGE = "pretrain"
VERSION = 1
STATE = "state.pt"
COMMIT_SECONDS = 15.0
VOCAB_SIZE = 512
SPECIAL = ("<|endoftext|>", "<|pad|>", "<|unk|>")


@dataclass
class PretrainConfig(StageConfig):
    """Configuration of `pretrain`."""

    data: str = input_(doc="the pool, or ingest's output_dir")
    tokenizer: str = input_("", doc="folder of the tokenizer to use; default: one is trained on the pool")
    hidden_size: int = identity(64, doc="width; a multiple of heads")
    intermediate_size: int = identity(64, doc="width of an expert")
    layers: int = identity(2, doc="decoder layers")
    heads: int = identity(4, doc="attention heads")
    experts: int = identity(4, doc="experts per layer")
    top_k: int = identity(2, doc="experts per token")
    vocab_size: int | None = identity(
        None, doc=f"entries of the trained tokenizer, at least 300 (256 bytes and some merges); default {VOCAB_SIZE}"
    )
    steps: int = identity(60, doc="optimizer steps")
    batch_size: int = identity(8, doc="rows per step")
    learning_rate: float = identity(3e-3, doc="of AdamW; decays linearly to 0")
    max_length: int = identity(128, doc="tokens of a row, and positions of the model")

    def validate(self) -> None:
        """Check sizes.

        Raises:
            UserError: a value is out of its range.
        """
        for name in ("hidden_size", "intermediate_size", "layers", "heads", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: at least 1")
        if self.max_length < 2:
            raise UserError(f"max_length={self.max_length}: at least 2, for a single token predicts nothing")
        if self.hidden_size % (2 * self.heads):
            raise UserError(f"hidden_size={self.hidden_size} must be an even multiple of heads={self.heads}")
        if self.experts < 2 or not 1 <= self.top_k <= self.experts:
            raise UserError(f"experts={self.experts} must be at least 2, and top_k={self.top_k} between 1 and experts")
        if self.vocab_size is not None and self.vocab_size < 300:
            raise UserError(f"vocab_size={self.vocab_size}: at least 300")
        if self.vocab_size is not None and self.tokenizer:
            raise UserError(
                f"vocab_size={self.vocab_size} is read where the tokenizer is trained, not beside tokenizer="
            )
        if not 0 < self.learning_rate <= 1:
            raise UserError(f"learning_rate={self.learning_rate} must be above 0 and at most 1")


def run(config: PretrainConfig) -> Path:
    """Train and write the checkpoint.

    Returns:
        The output directory.

    Raises:
        UserError: bad values, an empty pool, no tokenizer where one was named, or a training that diverged.
    """
    config.validate()
    where = str(pool.locate(config.data))
    if config.tokenizer:
        if not Path(config.tokenizer).is_dir():
            raise UserError(f"tokenizer={config.tokenizer} is no folder: name one that holds a tokenizer.json")
        template.load_tokenizer(config.tokenizer)  # refuses what is none
    with stage.begin(STAGE, VERSION, config, inputs={"pool": where, "tokenizer": config.tokenizer}) as out:
        if out.done:
            return out.path
        rows = pool.read_pool(where)
        if not rows:
            raise UserError(f"data={where} holds no row")
        if config.tokenizer:
            for file in sorted(Path(config.tokenizer).iterdir()):
                if file.name in checkpoint.TOKENIZER_FILES:
                    shutil.copyfile(file, out.staging / file.name)
        else:
            train_tokenizer(rows, config.vocab_size or VOCAB_SIZE, out.staging)
        model = train(rows, out.staging, config, out)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            checkpoint.write_tensors(
                out.staging, sorted(checkpoint.read_tensors(Path(folder)), key=lambda pair: pair[0])
            )
        settings = model.config.to_dict()
        for key in ("_name_or_path", "transformers_version"):
            settings.pop(key, None)
        settings |= {"architectures": ["OlmoeForCausalLM"], "dtype": "float32"}
        checkpoint.write_json(out.staging / "config.json", settings)
        out.commit(rows_in=len(rows), rows_out=len(rows), bookkeeping=["tokenizer_config.json"])
    return out.path


def train_tokenizer(rows: list[pool.Row], vocab_size: int, directory: Path) -> None:
    """Train a byte-level BPE tokenizer on the rows' texts, in their order, and save it in transformers' form."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    trained = ByteLevelBPETokenizer()
    texts = [message["content"] for row in rows for message in row.messages]
    trained.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=list(SPECIAL), show_progress=False)
    eos, pad, unknown = SPECIAL
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, eos_token=eos, pad_token=pad, unk_token=unknown
    )
    wrapped.save_pretrained(directory)


def train(rows: list[pool.Row], tokenizer_dir: Path, config: PretrainConfig, out: Output) -> Any:
    """Train the model; every step's rows follow from seed and step alone, so a restart goes on exactly.

    Raises:
        UserError: the loss is no longer finite.
    """
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    from selectmoe.device import deterministic, pick_device, require_finite, set_threads
    from selectmoe.progress import progress

    set_threads(config.threads)
    deterministic(config.seed)
    device = pick_device()
    tokenizer = template.load_tokenizer(tokenizer_dir)
    encoded = template.encode_many(rows, tokenizer, config.max_length)
    model = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=len(tokenizer) if config.tokenizer else config.vocab_size or VOCAB_SIZE,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            num_experts=config.experts,
            num_experts_per_tok=config.top_k,
            max_position_embeddings=max(1024, config.max_length),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)
    start = 0
    if (data := out.work.get(STATE)) is not None:
        state = torch.load(io.BytesIO(data), weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = int(state["step"])
    committed = time.monotonic()
    for step in progress(range(start, config.steps), "pretrain", total=config.steps - start, unit="step"):
        chosen = random.Random(f"{config.seed}:{step}").choices(encoded, k=config.batch_size)
        width = max(map(len, chosen))
        ids = torch.tensor([e.input_ids + [tokenizer.pad_token_id] * (width - len(e)) for e in chosen], device=device)
        mask = torch.tensor([[1] * len(e) + [0] * (width - len(e)) for e in chosen], device=device)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - step / config.steps)
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        if not math.isfinite(value := float(loss.detach())):
            raise UserError(f"the loss was {value} at step {step}: lower learning_rate")
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        out.metric("loss", value, step=step)
        if time.monotonic() - committed > COMMIT_SECONDS:
            buffer = io.BytesIO()
            kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(kept, buffer)
            out.keep_metrics()
            out.work.put_bytes(STATE, buffer.getvalue())
            committed = time.monotonic()
    require_finite(model.parameters(), f"learning_rate={config.learning_rate}")
    return model.eval()
