"""Bits of held-out answers under a model: what a compressor would need for the answer, given what it answers.

No command runs this module; `evaluate` does (torch side). Bits of a row = sum over the tokens of the assistant's texts of
-log2 p(token | everything before). The EOS after an answer is *not* counted, so that bits and UTF-8 bytes are those of the
same text; tags and newlines of the template are not counted either.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from selectmoe.finetuning import SAVE_SECONDS, answer_nll, by_length, pad
from selectmoe.pool import Row
from selectmoe.progress import progress
from selectmoe.template import Encoded, encode_many

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from selectmoe.stage import Output

RECORD = "holdout.json"
CUT = "longer than max_length"
EMPTY = "no answer"


def answer_text(encoded: Encoded, eos_id: int) -> list[bool]:
    """Which tokens belong to the text of an answer: the answer's without its EOS (no token of a text is special)."""
    return [on and token != eos_id for on, token in zip(encoded.answer, encoded.input_ids, strict=True)]


def answer_bytes(row: Row) -> int:
    """UTF-8 bytes of a row's answers (a lone surrogate counts three)."""
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in row.answers)


def measurable(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Row], list[Encoded], dict[str, int]]:
    """The rows whose whole answer can be measured, encoded; and reason -> number of the others."""
    encoded = encode_many(rows, tokenizer, max_length)
    eos = int(tokenizer.eos_token_id)
    reasons = [
        CUT if e.truncated else "" if any(answer_text(e, eos)[1:]) and answer_bytes(row) else EMPTY
        for row, e in zip(rows, encoded, strict=True)
    ]
    kept = [(row, e) for row, e, reason in zip(rows, encoded, reasons, strict=True) if not reason]
    return [row for row, _ in kept], [e for _, e in kept], dict(Counter(r for r in reasons if r))


@torch.inference_mode()
def answer_bits(
    model: Any, encoded: Sequence[Encoded], eos_id: int, pad_id: int, batch_size: int, out: Output
) -> list[float]:
    """Bits of every row's answers, committed batch by batch.

    Args:
        model: a causal language model in eval mode.
        encoded: N rows, none without an answer.
        eos_id: token that ends an answer.
        pad_id: token of the padding.
        batch_size: rows per batch; batches are of similar length.
        out: the stage's output, whose work takes up the finished batches.

    Returns:
        N numbers, in the order of `encoded`; summed in float64.
    """
    batches = by_length(encoded, range(len(encoded)), batch_size)
    data = out.work.get(RECORD)
    done: list[list[float]] = json.loads(data) if data else []
    saved = time.monotonic()
    for rows in progress(batches[len(done) :], "held-out answers", unit="batch"):
        learned = [answer_text(encoded[i], eos_id) for i in rows]
        batch = pad([encoded[i] for i in rows], learned, pad_id, model.device)
        nll = answer_nll(model, batch).double().cpu()
        parts = torch.split(nll, [sum(chosen[1:]) for chosen in learned])
        done.append([float(part.sum()) / math.log(2) for part in parts])
        if time.monotonic() - saved > SAVE_SECONDS:
            out.work.put_bytes(RECORD, json.dumps(done).encode())
            saved = time.monotonic()
    bits = {i: value for rows, values in zip(batches, done, strict=True) for i, value in zip(rows, values, strict=True)}
    return [bits[i] for i in range(len(encoded))]
