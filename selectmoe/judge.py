"""The judge at work: pooled outputs of a batch of rows, and the answers' likelihood where it is asked for.

No command runs this module; `selectmoe route` reads a pool with it. Only the base model runs; what routers and gates say
of a layer is pooled on the device, in float32, as soon as it is said, so that nothing per token is kept. The lm_head sees
the positions that predict an answer token and no others, `HEAD_POSITIONS` at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from selectmoe import families
from selectmoe.batching import cut
from selectmoe.device import deterministic, pick_device, set_threads
from selectmoe.errors import UserError
from selectmoe.families import Family
from selectmoe.memory import give_back
from selectmoe.router_weights import check_origin, load_router_weights
from selectmoe.template import Kind, load_tokenizer

if TYPE_CHECKING:
    from selectmoe.route import RouteConfig

HEAD_POSITIONS = 1024
"""Answer positions whose logits over the vocabulary are held at once."""

Arrays = dict[str, npt.NDArray[Any]]
Tokens = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]
"""Ids and kinds (`selectmoe.template.Kind`) of a row's tokens."""


@dataclass
class Batch:
    """B rows padded on the right to T tokens; all tensors [B, T]."""

    ids: Tensor
    """int64"""
    mask: Tensor
    """bool, valid tokens"""
    answer: Tensor
    """bool, answer tokens"""

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(self.ids.to(device), self.mask.to(device), self.answer.to(device))

    def head(self, rows: int) -> Batch:
        """Its first rows."""
        return Batch(self.ids[:rows], self.mask[:rows], self.answer[:rows])


@dataclass
class Judge:
    """The model that reads, its tokenizer, and what is asked of it."""

    family: Family
    tokenizer: Any
    device: torch.device
    config: RouteConfig

    @classmethod
    def load(cls, config: RouteConfig) -> Judge:
        """Load the checkpoint and put the trained router weights into it.

        Raises:
            UserError: the tokenizer does not fit the model, the model has fewer positions than max_length, the weights
                are of another model, or something is asked for that this kind of model does not have.
        """
        set_threads(config.threads)
        give_back()  # batches are prepared in one thread, and freed in another
        deterministic(config.seed)
        device, place = pick_device(), config.selector_model.path
        family = families.load(place, device, config.selector_model.trash_expert)
        if config.model_checkpoint_path:
            if not family.gates:
                raise UserError(f"model_checkpoint_path= goes with a Select-MoE checkpoint, which {place} is not")
            check_origin(config.model_checkpoint_path, place)
            load_router_weights(family.model, config.model_checkpoint_path)
        family.model.eval()
        if not (config.nll or family.embeds):
            family.skip_last_experts()
        tokenizer = load_tokenizer(place)
        check_fit(family.model, tokenizer, config.max_length, place)
        return cls(family, tokenizer, device, config)

    def batch(self, rows: Sequence[Tokens], length: int) -> Batch:
        """Pad rows, on the CPU."""
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        ids = np.full((len(rows), length), pad or 0, dtype=np.int64)
        mask = np.zeros((len(rows), length), dtype=bool)
        answer = np.zeros((len(rows), length), dtype=bool)
        for at, (tokens, kinds) in enumerate(rows):
            ids[at, : len(tokens)] = tokens
            mask[at, : len(tokens)] = True
            answer[at, : len(tokens)] = kinds == Kind.ASSISTANT
        return Batch(*map(torch.from_numpy, (ids, mask, answer)))

    def read(self, batch: Batch) -> Arrays:
        """Pooled outputs of one batch, and `nll` where it is asked for."""
        batch = batch.to(self.device)
        with torch.inference_mode(), Listening(self.family, batch) as heard:
            hidden = self._hidden(batch)
            if self.family.embeds:
                heard.embedding = weighted_mean(hidden, batch.mask)
            arrays = heard.arrays()
            if self.config.nll:
                arrays["nll"] = answer_nll(self.family.model.get_output_embeddings(), hidden, batch.ids, batch.answer)
        return arrays

    def answer_batches(self, rows: Sequence[Tokens]) -> list[tuple[npt.NDArray[np.int64], Batch]]:
        """The rows' answers without their questions: positions among `rows` and batch, rows without an answer left out."""
        alone = [answers_only(*tokens) for tokens in rows]
        lengths = np.array([len(ids) for ids, _ in alone], np.int64)
        order = np.lexsort((np.arange(len(rows)), -lengths))[: int((lengths > 0).sum())]
        starts = cut(lengths[order], self.config.token_budget, self.config.batch_size)
        parts = [order[a:b] for a, b in pairwise(starts)]
        return [(part, self.batch([alone[i] for i in part], int(lengths[part[0]]))) for part in parts]

    def read_answers(self, batch: Batch) -> npt.NDArray[np.float64]:
        """[B] mean NLL of answers without their questions, over the same answer tokens as with them."""
        batch = batch.to(self.device)
        with torch.inference_mode():
            head = self.family.model.get_output_embeddings()
            return answer_nll(head, self._hidden(batch), batch.ids, batch.answer)

    def _hidden(self, batch: Batch) -> Tensor:
        base = self.family.model.base_model
        hidden: Tensor = base(
            input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False, return_dict=True
        ).last_hidden_state
        return hidden


def check_fit(model: Any, tokenizer: Any, max_length: int, place: str) -> None:
    """Refuse a tokenizer with more tokens than the model has, and rows longer than it has positions for.

    Raises:
        UserError: as said.
    """
    rows = model.get_input_embeddings().num_embeddings
    if (largest := max(tokenizer.get_vocab().values())) >= rows:
        raise UserError(
            f"{place}: the tokenizer has the token id {largest}, the model {rows} embeddings: it is another model's tokenizer"
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and max_length > positions:
        raise UserError(f"max_length={max_length} is more than the {positions} positions of {place}: lower it")


class Listening:
    """Hooks on a family's routers and gates that pool what they say, layer by layer."""

    def __init__(self, family: Family, batch: Batch) -> None:
        """Listen to the forward pass over this batch."""
        self._family, self._batch = family, batch
        self._probs: list[Tensor] = []
        self._gates: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.embedding: Tensor | None = None

    def __enter__(self) -> Listening:
        """Place the hooks."""
        with ExitStack() as stack:
            for router in self._family.routers:
                stack.callback(router.register_forward_hook(self._router).remove)
            for gate in self._family.gates:
                stack.callback(gate.register_forward_hook(self._gate).remove)
            self._hooks = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the hooks."""
        self._hooks.close()

    def _router(self, module: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        self._probs.append(pool_probs(output[0], self._batch.mask))

    def _gate(self, module: Any, inputs: Any, output: Tensor) -> None:
        self._gates.append(pool_scores(output, self._batch.mask, self._batch.answer))

    def arrays(self) -> Arrays:
        """What was heard: router_probs [B, L, E], the four scores [B, L], embedding [B, H]; what is not there is left out."""
        found: dict[str, Tensor] = {}
        if self._gates:
            names = ("quality_score", "good_ratio", "quality_score_answer", "good_ratio_answer")
            found = {name: torch.stack(layers, dim=1) for name, layers in zip(names, zip(*self._gates))}
        if self._probs:
            found["router_probs"] = torch.stack(self._probs, dim=1)
        if self.embedding is not None:
            found["embedding"] = self.embedding
        return {name: tensor.float().cpu().numpy() for name, tensor in found.items()}


def pool_probs(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean over valid tokens of the softmax over all experts, float32: logits [B * T, E], mask [B, T] -> [B, E]."""
    soft = torch.softmax(logits.float(), dim=-1).reshape(*mask.shape, -1)
    return torch.where(mask[..., None], soft, 0).sum(1) / mask.sum(-1)[:, None]


def pool_scores(scores: Tensor, mask: Tensor, answer: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means of a layer's raw scores [B, T, 1] and of their sigmoids, over valid tokens, then over answer tokens.

    Returns:
        Four times [B] float32; NaN where a row has no token to average over.
    """
    raw = scores.reshape(mask.shape).float()
    ratio = torch.sigmoid(raw)

    def mean(values: Tensor, over: Tensor) -> Tensor:
        return torch.where(over, values, 0).sum(-1) / over.sum(-1)

    return mean(raw, mask), mean(ratio, mask), mean(raw, answer), mean(ratio, answer)


def weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of hidden states [B, T, H] over valid tokens, the n-th weighing n (a causal model's later tokens know more)."""
    weights = mask.cumsum(-1).float() * mask
    return (hidden.float() * weights[..., None]).sum(1) / weights.sum(-1)[:, None]


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU or the CPU's allocator ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def fitting_rows(judge: Judge, batch: Batch) -> int:
    """How many of a batch's rows, halving, fit into memory at once; 0 if not even one does."""
    rows = len(batch.ids) // 2
    while rows:
        try:
            judge.read(batch.head(rows))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            rows //= 2
        else:
            return rows
    return 0


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


def answers_only(ids: npt.NDArray[np.int32], kinds: npt.NDArray[np.uint8]) -> Tokens:
    """The assistant's messages of a row as if nothing else had been said, up to its last answer token; else empty."""
    answers = np.flatnonzero(kinds == Kind.ASSISTANT)
    if not len(answers):
        return ids[:0], kinds[:0]
    chosen = np.isin(kinds, (Kind.BOS, Kind.ASSISTANT, Kind.ANSWER_TAG))
    chosen[answers[-1] + 1 :] = False
    return ids[chosen], kinds[chosen]
