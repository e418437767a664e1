"""What the frozen judge shows its gates, read once: per token and layer the hidden state that the quality gate reads.

No command runs this module. In observer mode no gate changes what another reads, nor what the model computes, so every
observer of the study can be trained and scored on these. float32; one file per batch, mapped into memory, and an index
beside it that is written last: a file without one is made again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bench.judge.pools import Key
from selectmoe.batching import cut
from selectmoe.errors import UserError
from selectmoe.modeling import QualityGate
from selectmoe.pool import Row
from selectmoe.progress import progress
from selectmoe.storage import LocalStore
from selectmoe.template import Encoded, encode_many


@dataclass(frozen=True)
class Part:
    """The rows of one batch.

    Attributes:
        hidden: [tokens, L, H] float32, row after row.
        starts: [rows + 1], where each row begins.
        answer: [tokens] bool, answer tokens.
        keys: of the rows.
    """

    hidden: Tensor
    starts: npt.NDArray[np.int64]
    answer: npt.NDArray[np.bool_]
    keys: list[Key]


class Features:
    """The features in some folders; rows are found by their key."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.parts = [_open(path) for folder in folders for path in sorted(folder.glob("*.json"))]
        self.where = {key: (part, n) for part in self.parts for n, key in enumerate(part.keys)}

    def row(self, key: Key) -> tuple[Tensor, Tensor]:
        """Hidden states [tokens, L, H] and answer mask [tokens] of a row."""
        part, n = self.where[key]
        start, end = int(part.starts[n]), int(part.starts[n + 1])
        return part.hidden[start:end], torch.from_numpy(part.answer[start:end])


def _open(index: Path) -> Part:
    about = json.loads(index.read_text(encoding="utf-8"))
    # Mapped copy-on-write: torch warns of memory that it may not write to.
    hidden = torch.from_numpy(np.load(index.with_suffix(".npy"), mmap_mode="c"))
    starts = np.concatenate([[0], np.cumsum(about["lengths"])]).astype(np.int64)
    answer = np.array([mark == "1" for mark in about["answer"]], dtype=bool)
    return Part(hidden, starts, answer, [(dataset, id_) for dataset, id_ in about["keys"]])


def read(
    folder: Path, model: Any, tokenizer: Any, rows: Sequence[Row], max_length: int, budget: int, answers_only: bool
) -> None:
    """Read rows that are not in the folder yet.

    Args:
        folder: created.
        model: a `SelectMoeForCausalLM` in observer mode, on the CPU.
        tokenizer: its tokenizer.
        rows: in any order; the same ones at every start.
        max_length: tokens of a row.
        budget: padded tokens per forward pass.
        answers_only: keep the answer tokens alone (all that `contrastive` reads of a copy).

    Raises:
        UserError: a row has no answer token.
    """
    unique = list({row.key: row for row in rows}.values())
    pairs = [(row, e) for row, e in zip(unique, encode_many(unique, tokenizer, max_length), strict=True)]
    if empty := [row.id for row, e in pairs if not any(e.answer)]:
        raise UserError(f"row {empty[0]} has no answer token among its first {max_length}: no judge could score it")
    pairs.sort(key=lambda p: (-len(p[1]), p[0].key))
    store = LocalStore(folder)
    batches = [pairs[a:b] for a, b in pairwise(cut([len(e) for _, e in pairs], budget).tolist())]
    todo = [n for n in range(len(batches)) if not (folder / f"{n:04d}.json").is_file()]
    folder.mkdir(parents=True, exist_ok=True)
    for n in progress(todo, f"hidden states {folder.name}", unit="batch"):
        encoded = [e for _, e in batches[n]]
        states = hidden_states(model, encoded, tokenizer.pad_token_id)
        kept = [np.array(e.answer) if answers_only else np.ones(len(e), bool) for e in encoded]
        values = np.concatenate([states[i, : len(keep)][keep] for i, keep in enumerate(kept)])
        temporary = folder / f".{n:04d}.npy"
        np.save(temporary, values)
        temporary.rename(folder / f"{n:04d}.npy")
        about = {
            "keys": [row.key for row, _ in batches[n]],
            "lengths": [int(keep.sum()) for keep in kept],
            "answer": "".join(
                str(int(a)) for e, keep in zip(encoded, kept, strict=True) for a in np.array(e.answer)[keep]
            ),
        }
        store.put_bytes(f"{n:04d}.json", json.dumps(about).encode())


@torch.inference_mode()
def hidden_states(model: Any, encoded: Sequence[Encoded], pad: int) -> npt.NDArray[np.float32]:
    """[B, T, L, H]: what every layer's gate reads."""
    width = max(len(e) for e in encoded)
    ids = torch.tensor([e.input_ids + [pad] * (width - len(e)) for e in encoded])
    mask = torch.tensor([[1] * len(e) + [0] * (width - len(e)) for e in encoded])
    seen: list[Tensor] = []
    gates = [module for module in model.modules() if isinstance(module, QualityGate)]
    hooks = [gate.register_forward_pre_hook(lambda _, given: seen.append(given[0].float())) for gate in gates]
    try:
        model.model(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    stacked: npt.NDArray[np.float32] = torch.stack(seen, dim=2).numpy()
    return stacked
