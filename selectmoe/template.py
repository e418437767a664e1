r"""The one text template, for training, routing and fine-tuning alike: messages -> token ids and masks.

No command runs this module. A row becomes (after LESS, https://arxiv.org/abs/2402.04333)::

    <|system|>\nTEXT\n   <|user|>\nTEXT\n   <|assistant|>\nTEXT EOS \n

Segments (role tag, text, newline) are encoded one by one, special tokens in texts disabled, and the masks come from the
segments' borders: a user who writes ``<|assistant|>`` or ``<|endoftext|>`` moves no mask and ends no text. All segments of
many rows go through the tokenizer in one call. A BOS token is put first where the tokenizer itself would put one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selectmoe.errors import UserError
from selectmoe.pool import ROLES, Message, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is not learned."""

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


def _token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of plain texts: nothing added, nothing in them special."""
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    # A vocabulary that holds the special token's letters as a common word can still yield it from text.
    special = set(tokenizer.all_special_ids) - ({tokenizer.unk_token_id} - {tokenizer.eos_token_id})
    return [tokens if special.isdisjoint(tokens) else [t for t in tokens if t not in special] for tokens in ids]


def _bos(tokenizer: Any) -> list[int]:
    """[BOS] where the tokenizer would put one before a text of its own accord, else nothing."""
    if tokenizer.bos_token_id is None:
        return []
    return [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else []


def encode_conversations(
    conversations: Iterable[Sequence[Message]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Encoded]:
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
    fixed = _token_ids(tokenizer, [NEWLINE, *TAGS.values()])
    newline, tags = fixed[0], dict(zip(TAGS, fixed[1:], strict=True))
    texts = iter(_token_ids(tokenizer, [m["content"] for messages in rows for m in messages]))
    bos, eos = _bos(tokenizer), [int(tokenizer.eos_token_id)]
    encoded = []
    for messages in rows:
        segments: list[tuple[list[int], str]] = [(bos, "bos")]
        for message in messages:
            role = message["role"]
            segments += [(tags[role], "tag"), (next(texts), role)]
            if role == "assistant":
                segments.append((eos, role))
            segments.append((newline, "tag"))
        encoded.append(_join(segments, max_length))
    return encoded


def _join(segments: list[tuple[list[int], str]], max_length: int) -> Encoded:
    ids: list[int] = []
    masks: dict[str, list[bool]] = {"assistant": [], "user": [], "tag": []}
    for tokens, kind in segments:
        ids += tokens
        for name, mask in masks.items():
            mask += [name == kind] * len(tokens)
    answer, user, tag = (mask[:max_length] for mask in masks.values())
    return Encoded(ids[:max_length], answer, user, tag, len(ids) > max_length)


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
