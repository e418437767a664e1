"""The judge at work: pooled router outputs of a batch of rows, and the answers' likelihood where it is asked for.

No command runs this module; `selectmoe route` reads a pool with it. Only the base model runs; the lm_head sees the
positions that predict an answer token and no others, `HEAD_POSITIONS` at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from selectmoe.batching import cut
from selectmoe.device import default_dtype, deterministic, pick_device, set_threads
from selectmoe.modeling import load_judge
from selectmoe.router_data import TENSORS
from selectmoe.router_weights import check_origin, load_router_weights
from selectmoe.template import Encoded, encode_answers_only, load_tokenizer

if TYPE_CHECKING:
    from selectmoe.pool import Row
    from selectmoe.route import RouteConfig

HEAD_POSITIONS = 1024
"""Answer positions whose logits over the vocabulary are held at once."""

Arrays = dict[str, npt.NDArray[Any]]


@dataclass
class Judge:
    """The model that reads, its tokenizer, and what is asked of it."""

    model: Any
    tokenizer: Any
    device: torch.device
    config: RouteConfig

    @classmethod
    def load(cls, config: RouteConfig) -> Judge:
        """Load the checkpoint and put the trained router weights into it."""
        set_threads(config.threads)
        deterministic(config.seed)
        device = pick_device()
        chosen = config.selector_model
        model = load_judge(chosen.path, device, default_dtype(device), chosen.trash_expert)
        if config.model_checkpoint_path:
            check_origin(config.model_checkpoint_path, config.selector_model.path)
            load_router_weights(model, config.model_checkpoint_path)
        return cls(model.eval(), load_tokenizer(config.selector_model.path), device, config)

    def tensors(self, encoded: Sequence[Encoded], length: int) -> tuple[Tensor, Tensor, Tensor]:
        """input_ids int64, attention mask and answer mask bool, each [B, length], padded on the right."""
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        ids = np.full((len(encoded), length), pad or 0, dtype=np.int64)
        mask = np.zeros((len(encoded), length), dtype=bool)
        answer = np.zeros((len(encoded), length), dtype=bool)
        for row, e in enumerate(encoded):
            ids[row, : len(e.input_ids)] = e.input_ids
            mask[row, : len(e.input_ids)] = True
            answer[row, : len(e.answer)] = e.answer
        return tuple(torch.from_numpy(a).to(self.device) for a in (ids, mask, answer))  # type: ignore[return-value]

    def read(self, encoded: Sequence[Encoded], length: int) -> Arrays:
        """Pooled router outputs of one batch, and `nll` where it is asked for."""
        with torch.inference_mode():
            ids, mask, answer = self.tensors(encoded, length)
            base = self.model.model(
                input_ids=ids, attention_mask=mask.long(), output_router_logits=True, use_cache=False
            )
            arrays = pool_outputs(base.quality_score, base.moe_logits, mask, answer)
            if self.config.nll:
                arrays["nll"] = answer_nll(self.model.lm_head, base.last_hidden_state, ids, answer)
        return arrays

    def read_answers(self, rows: Sequence[Row], answer_tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """[B] mean NLL of the rows' answers without their questions, over the same answer tokens as with them."""
        out = np.full(len(rows), np.nan)
        alone = encode_answers_only((row.messages for row in rows), self.tokenizer, self.config.max_length)
        ends = [answer_end(e.answer, int(n)) for e, n in zip(alone, answer_tokens, strict=True)]
        order = sorted((i for i in range(len(rows)) if ends[i]), key=lambda i: (-ends[i], i))
        for part in cut([ends[i] for i in order], self.config.token_budget, self.config.batch_size):
            chosen = order[part.start : part.stop]
            with torch.inference_mode():
                ids, mask, answer = self.tensors([clip(alone[i], ends[i]) for i in chosen], ends[chosen[0]])
                base = self.model.model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
                out[chosen] = answer_nll(self.model.lm_head, base.last_hidden_state, ids, answer)
        return out


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU or the CPU's allocator ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def fitting_rows(judge: Judge, encoded: Sequence[Encoded], length: int) -> int:
    """How many of the rows, halving, fit into memory at once; 0 if not even one does."""
    rows = len(encoded) // 2
    while rows:
        try:
            judge.read(encoded[:rows], length)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            rows //= 2
        else:
            return rows
    return 0


def pool_outputs(quality_score: Sequence[Tensor], moe_logits: Sequence[Tensor], mask: Tensor, answer: Tensor) -> Arrays:
    """Means over tokens, in float32 on the device.

    Args:
        quality_score: per layer [B, T, 1], raw.
        moe_logits: per layer [B * T, E], raw.
        mask: [B, T] bool, valid tokens.
        answer: [B, T] bool, answer tokens.

    Returns:
        The arrays of `TENSORS`: [B, L], and router_probs [B, L, E]; NaN where a row has no token to average over.
    """
    rows, tokens = mask.shape
    raw = torch.stack([score.reshape(rows, tokens).float() for score in quality_score], dim=1)
    ratio = torch.sigmoid(raw)

    def mean(values: Tensor, over: Tensor) -> Tensor:
        return torch.where(over[:, None], values, 0).sum(-1) / over.sum(-1)[:, None]

    probs = []
    for logits in moe_logits:
        soft = torch.softmax(logits.float(), dim=-1).reshape(rows, tokens, -1)
        probs.append(torch.where(mask[..., None], soft, 0).sum(1) / mask.sum(-1)[:, None])
    pooled = (mean(raw, mask), mean(ratio, mask), mean(raw, answer), mean(ratio, answer), torch.stack(probs, dim=1))
    return {name: tensor.float().cpu().numpy() for name, tensor in zip(TENSORS, pooled, strict=True)}


def answer_nll(head: Any, hidden: Tensor, ids: Tensor, answer: Tensor) -> npt.NDArray[np.float64]:
    """Mean negative log-likelihood per answer token, in nats; the head sees only the positions that predict one.

    Args:
        head: the lm_head.
        hidden: [B, T, H] last hidden states.
        ids: [B, T] token ids.
        answer: [B, T] bool.

    Returns:
        [B] float64, NaN for a row without an answer token.
    """
    row, at = torch.nonzero(answer[:, 1:], as_tuple=True)
    losses = []
    for start in range(0, len(row), HEAD_POSITIONS):
        r, t = row[start : start + HEAD_POSITIONS], at[start : start + HEAD_POSITIONS]
        logits = head(hidden[r, t]).float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[r, t + 1], reduction="none").cpu().numpy())
    which = row.cpu().numpy()
    total = np.bincount(which, np.concatenate(losses or [np.zeros(0)]).astype(np.float64), minlength=len(ids))
    number = np.bincount(which, minlength=len(ids))
    mean: npt.NDArray[np.float64] = np.divide(total, number, out=np.full(len(ids), np.nan), where=number > 0)
    return mean


def answer_end(answer: Sequence[bool], wanted: int) -> int:
    """Number of leading tokens that hold the first `wanted` answer tokens; 0 when none is wanted or there."""
    at = [i for i, is_answer in enumerate(answer) if is_answer][:wanted]
    return at[-1] + 1 if at else 0


def clip(encoded: Encoded, end: int) -> Encoded:
    """The first `end` tokens."""
    cut_off = encoded.truncated or end < len(encoded)
    return Encoded(encoded.input_ids[:end], encoded.answer[:end], encoded.user[:end], encoded.tag[:end], cut_off)
