r"""The one text template, for training, routing and fine-tuning alike: messages -> token ids and masks.

No command runs this module. A row becomes (after LESS, https://arxiv.org/abs/2402.04333)::

    <|system|>\nTEXT\n   <|user|>\nTEXT\n   <|assistant|>\nTEXT EOS \n

Segments (role tag, text, newline) are encoded one by one, special tokens in texts disabled, and the masks come from the
segments' borders: a user who writes ``<|assistant|>`` or ``<|endoftext|>`` moves no mask and ends no text. All segments of
many rows go through the tokenizer in one call. A BOS token is put first where the tokenizer itself would put one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from selectmoe.errors import UserError
from selectmoe.pool import ROLES, Message, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is not learned."""


class Kind(IntEnum):
    """What a token of a row is part of."""

    BOS = 0
    SYSTEM = 1
    USER = 2
    ASSISTANT = 3
    """Text of the assistant and the EOS that ends it."""
    TAG = 4
    """Role tag and newline of a message that is not the assistant's."""
    ANSWER_TAG = 5
    """Those of one that is."""


ROLE_KINDS = {
    "system": (Kind.SYSTEM, Kind.TAG),
    "user": (Kind.USER, Kind.TAG),
    "assistant": (Kind.ASSISTANT, Kind.ANSWER_TAG),
}
"""Role -> kind of its text, kind of its tag and newline."""
NEWLINE = "\n"
TAGS = {role: f"<|{role}|>\n" for role in ROLES}


@dataclass(frozen=True, slots=True)
class Encoded:
    """A row in tokens; all lists have one entry per token."""

    input_ids: list[int]
    answer: list[bool]
    """Text of the assistant and the EOS that ends it."""
    user: list[bool]
    """Text of the user."""
    tag: list[bool]
    """Role tags and the newlines after texts (BOS is nobody's)."""
    truncated: bool
    """Whether tokens were cut off at max_length."""

    def __len__(self) -> int:
        return len(self.input_ids)


def load_tokenizer(path: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; one without a padding token pads with EOS (padding is masked everywhere).

    Raises:
        UserError: there is no tokenizer at `path`, or it has no EOS token, or it is not one of the `tokenizers` library.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0].rstrip(":")
        raise UserError(
            f"no tokenizer can be loaded from {path} ({reason}): save it there with save_pretrained"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {path} has no tokenizer.json: save it in that form first")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {path} has no EOS token, which ends every answer")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@dataclass(frozen=True)
class Segments:
    """Rows in tokens, one after the other: what masks and batches are made of. S tokens in N rows."""

    input_ids: npt.NDArray[np.int32]
    """[S]"""
    kinds: npt.NDArray[np.uint8]
    """[S] a `Kind` per token."""
    lengths: npt.NDArray[np.int64]
    """[N] tokens of each row, at most max_length."""
    truncated: npt.NDArray[np.bool_]
    """[N] whether tokens were cut off at max_length."""


def _token_ids(tokenizer: Any, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """The tokens of plain texts, one after the other, and how many each has: nothing added, nothing in them special.

    This is what the tokenizer's own call comes to, without the lists that it makes of everything.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = True
    found = [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    lengths = np.fromiter(map(len, found), np.int64, len(found))
    ids = np.fromiter(itertools.chain.from_iterable(found), np.int32, int(lengths.sum()))
    # A vocabulary that holds the special token's letters as a common word can still yield it from text.
    special = set(tokenizer.all_special_ids) - ({tokenizer.unk_token_id} - {tokenizer.eos_token_id})
    bad = np.isin(ids, np.fromiter(special, np.int32))
    if bad.any():
        owners = np.repeat(np.arange(len(found)), lengths)
        lengths = lengths - np.bincount(owners[bad], minlength=len(found))
        ids = ids[~bad]
    return ids, lengths


def _bos(tokenizer: Any) -> list[int]:
    """[BOS] where the tokenizer would put one before a text of its own accord, else nothing."""
    if tokenizer.bos_token_id is None:
        return []
    return [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else []


def encode_segments(
    conversations: Iterable[Sequence[Message]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Segments:
    """Encode many rows' messages with one call of the tokenizer.

    Args:
        conversations: messages of each row, roles system, user, assistant.
        tokenizer: with an EOS token, as `load_tokenizer` gives it.
        max_length: tokens kept of a row, from its beginning.

    Raises:
        ValueError: a message has another role.
    """
    rows = [list(messages) for messages in conversations]
    if unknown := {m["role"] for messages in rows for m in messages} - set(ROLES):
        raise ValueError(f"role {sorted(unknown)[0]!r} has no place in the template; known: {', '.join(ROLES)}")
    words = [NEWLINE, *TAGS.values(), *(m["content"] for messages in rows for m in messages)]
    ids, lengths = _token_ids(tokenizer, words)
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    newline, tags, texts = parts[0], dict(zip(TAGS, parts[1:])), iter(parts[1 + len(TAGS) :])
    bos, eos = np.array(_bos(tokenizer), np.int32), np.array([tokenizer.eos_token_id], np.int32)
    tokens: list[npt.NDArray[np.int32]] = []
    kinds: list[Kind] = []
    ends = []
    for messages in rows:
        tokens.append(bos)
        kinds.append(Kind.BOS)
        for message in messages:
            role = message["role"]
            text, tag = ROLE_KINDS[role]
            tokens += (
                (tags[role], next(texts), eos, newline) if role == "assistant" else (tags[role], next(texts), newline)
            )
            kinds += (tag, text, text, tag) if role == "assistant" else (tag, text, tag)
        ends.append(len(tokens))
    sizes = np.fromiter(map(len, tokens), np.int64, len(tokens))
    whole = np.diff(np.append(0, np.cumsum(sizes))[[0, *ends]])
    return _cut_off(np.concatenate(tokens or [bos]), np.repeat(np.array(kinds, np.uint8), sizes), whole, max_length)


def _cut_off(
    ids: npt.NDArray[np.int32], kinds: npt.NDArray[np.uint8], whole: npt.NDArray[np.int64], max_length: int
) -> Segments:
    """Rows of these lengths, each with its first `max_length` tokens."""
    truncated = whole > max_length
    if truncated.any():
        kept = np.arange(len(ids)) - np.repeat(np.cumsum(whole) - whole, whole) < max_length
        ids, kinds = ids[kept], kinds[kept]
    return Segments(ids, kinds, np.minimum(whole, max_length), truncated)


def encode_conversations(
    conversations: Iterable[Sequence[Message]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Encoded]:
    """`encode_segments`, row by row as lists."""
    found = encode_segments(conversations, tokenizer, max_length)
    answer, user = found.kinds == Kind.ASSISTANT, found.kinds == Kind.USER
    tag = np.isin(found.kinds, (Kind.TAG, Kind.ANSWER_TAG))
    encoded, start = [], 0
    for length, truncated in zip(found.lengths.tolist(), found.truncated.tolist()):
        here = slice(start, start + length)
        ids, *masks = (array[here].tolist() for array in (found.input_ids, answer, user, tag))
        encoded.append(Encoded(ids, masks[0], masks[1], masks[2], truncated))
        start += length
    return encoded


def encode(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Encode one row's messages; `encode_many` is faster for many."""
    return encode_conversations([messages], tokenizer, max_length)[0]


def encode_many(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Encoded]:
    """Encode rows, in their order."""
    return encode_conversations((row.messages for row in rows), tokenizer, max_length)


def encode_answer_only(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Encode the assistant's messages without what they answer (IFD's unconditional pass)."""
    return encode_answers_only([messages], tokenizer, max_length)[0]


def encode_answers_only(
    conversations: Iterable[Sequence[Message]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Encoded]:
    """`encode_answer_only` for many rows' messages."""
    only = ([m for m in messages if m["role"] == "assistant"] for messages in conversations)
    return encode_conversations(only, tokenizer, max_length)


def labels(encoded: Encoded, full_sequence_prediction: bool, mask_special_tokens: bool) -> list[int]:
    """What a model learns of a row: its token ids, `IGNORED` where nothing is learned (not shifted).

    Args:
        encoded: the row.
        full_sequence_prediction: True: the texts of user and assistant; False: the assistant's answers only.
        mask_special_tokens: whether tags and newlines are left out of a full sequence; among the answers there are none.
    """
    if not full_sequence_prediction:
        learned = encoded.answer
    else:
        tags = [False] * len(encoded) if mask_special_tokens else encoded.tag
        learned = [a or u or t for a, u, t in zip(encoded.answer, encoded.user, tags, strict=True)]
    return [token if on else IGNORED for token, on in zip(encoded.input_ids, learned, strict=True)]
