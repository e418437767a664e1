"""Rows that share words with the tasks that a model will be judged by: found exactly, and named with task and document.

    selectmoe ingest data=rows.jsonl decontaminate.tasks=[mmlu,bbh] output_dir=out/ingest
    selectmoe ingest data=rows.jsonl decontaminate.tasks=[mine] decontaminate.include_path=TASKS output_dir=out/ingest

A row goes when it holds n consecutive words (13 unless told otherwise; `selectmoe.ngrams` says what a word is) of a document
of a task: of its question, of question and answer together, or of a text field of its record. A text of 8 to n - 1 words
must be there as a whole; a shorter one proves nothing and is not looked for. N-grams that many documents of one task
share are the task's wording, not its content, and are left out (`COMMON`, `COMMON_SHARE`).

The tasks are lm-eval's, with the documents that `evaluate` would use (its `limit` aside). The index holds hashes and the
documents' words: some 30 bytes per word of the tasks, whatever the size of the pool. What the hashes find is compared
word by word.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selectmoe.config import execution, identity, input_
from selectmoe.errors import UserError
from selectmoe.manifest import canonical_json, identity_of
from selectmoe.ngrams import row_words, windows, windows_of, words
from selectmoe.pool import Message

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SHORTEST = 8
"""Words of the shortest text that is looked for."""
COMMON, COMMON_SHARE = 10, 0.05
"""An n-gram in more documents of a task than this number and this share is the task's wording."""
HOLDOUT = "holdout"


@dataclass
class DecontaminateConfig:
    """Rows that give away what a model will be judged by."""

    tasks: list[str] = identity(
        [], doc="lm-eval tasks whose words no row may hold: those that evaluate gets; none: off"
    )
    include_path: str = input_("", doc="folder of lm-eval task files of your own, as evaluate gets it")
    include_digest: str = execution("", doc="identity that include_path must have; a run sets it, for KFP's cache")
    holdout: bool = identity(False, doc="whether rows of the pool that share words with a row of the holdout go, too")
    ngram: int = identity(13, doc="consecutive words that a row and a document may not share; fewer: stricter")

    def validate(self) -> None:
        """Check the values.

        Raises:
            UserError: one is out of its range, or would have no effect.
        """
        if not SHORTEST <= self.ngram <= 50:
            raise UserError(f"decontaminate.ngram={self.ngram} must be from {SHORTEST} to 50")
        if self.include_path and not self.tasks:
            raise UserError("decontaminate.include_path without decontaminate.tasks: name the tasks")


@dataclass(frozen=True)
class Document:
    """A document of a task."""

    task: str
    id: str
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Overlap:
    """What a row shares with a document."""

    task: str
    document: str
    words: str

    @property
    def reason(self) -> str:
        """For the rejected row."""
        return f'shares "{self.words}" with document {self.document} of task {self.task}'


@dataclass(frozen=True)
class Ngrams:
    """The n-grams of one length [G], by hash; of several documents that hold one, the first counts."""

    length: int
    hashes: NDArray[np.uint64]
    starts: NDArray[np.int64]
    """Where its words begin in `Index.text`."""
    documents: NDArray[np.int64]
    table: NDArray[np.bool_]
    """Whether an n-gram's hash begins with these bits: what most n-grams of a pool are told by."""


class Index:
    """What rows are compared with; goes to worker processes as it is."""

    def __init__(self, documents: Iterable[Document], ngram: int) -> None:
        """Read the documents.

        Args:
            documents: in an order of their own: of several that hold one n-gram, the first is named.
            ngram: words that must be shared.
        """
        import numpy as np

        self.codes: dict[str, int] = {}
        self.names: list[tuple[str, str]] = []
        self.short = 0
        """Documents of which no text is long enough."""
        digest, texts = hashlib.sha256(), []
        spans: dict[int, list[tuple[int, int, int]]] = {}
        at = 0
        for number, document in enumerate(documents):
            digest.update(canonical_json([document.task, document.id, document.texts]) + b"\n")
            self.names.append((document.task, document.id))
            found = [text for text in map(words, document.texts) if len(text) >= SHORTEST]
            self.short += not found
            for text in found:
                codes = [self.codes.setdefault(word, len(self.codes) + 1) for word in text]
                texts.append(np.array(codes, np.int32))
                length = min(ngram, len(codes))
                spans.setdefault(length, []).append((at, len(codes) - length + 1, number))
                at += len(codes)
        self.identity = digest.hexdigest()
        """Digest of the documents."""
        self.text = np.concatenate([*texts, np.zeros(0, np.int32)])
        self.common = 0
        """N-grams that were left out as a task's wording."""
        self.ngrams = [self._ngrams(length, spans[length]) for length in sorted(spans, reverse=True)]

    def _ngrams(self, length: int, spans: Sequence[tuple[int, int, int]]) -> Ngrams:
        """The n-grams of texts: of each its place in `text`, the number of its n-grams, and its document."""
        import numpy as np

        starts = np.concatenate([np.arange(at, at + count) for at, count, _ in spans])
        documents = np.repeat([number for _, _, number in spans], [count for _, count, _ in spans])
        hashes = windows(self.text.astype(np.uint64), length)[starts]
        keep = self._is_content(hashes, documents)
        self.common += len(set(hashes[~keep].tolist()))
        hashes, starts, documents = hashes[keep], starts[keep], documents[keep]
        order = np.lexsort((documents, hashes))
        hashes, starts, documents = hashes[order], starts[order], documents[order]
        first = np.ones(len(hashes), bool)
        first[1:] = hashes[1:] != hashes[:-1]
        hashes, starts, documents = hashes[first], starts[first], documents[first]
        bits = max(10, min(27, int(np.ceil(np.log2(16 * len(hashes) + 1)))))
        table = np.zeros(1 << bits, bool)
        table[hashes >> np.uint64(64 - bits)] = True
        return Ngrams(length, hashes, starts, documents, table)

    def _is_content(self, hashes: NDArray[np.uint64], documents: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which places hold an n-gram that is not in too many documents of its task."""
        import numpy as np

        sizes = Counter(task for task, _ in self.names)
        numbers = {task: n for n, task in enumerate(sizes)}
        most = np.array([max(COMMON, COMMON_SHARE * size) for size in sizes.values()])
        of_task = np.array([numbers[task] for task, _ in self.names])
        _, grams = np.unique(hashes, return_inverse=True)
        once = np.unique(grams * len(self.names) + documents)  # an n-gram counts once per document
        gram, document = np.divmod(once, len(self.names))
        pairs, counts = np.unique(gram * len(sizes) + of_task[document], return_counts=True)
        count = counts[np.searchsorted(pairs, grams * len(sizes) + of_task[documents])]
        return np.asarray(count <= most[of_task[documents]])

    def find(self, rows: Iterable[Sequence[Message]]) -> dict[int, Overlap]:
        """What rows share with the documents.

        Args:
            rows: their messages; their words are in memory together.

        Returns:
            By the row's place: its first n-gram that a document holds, longer ones first. Rows without one are left out.
        """
        import numpy as np

        codes, begins, texts = array("Q"), [], []
        for messages in rows:
            begins.append(len(codes))
            texts.append(messages)
            codes.extend(self.codes.get(word, 0) for word in row_words(messages))
            codes.append(0)  # no document has it, so that no n-gram goes from row to row
        flat, starts = np.frombuffer(codes, np.uint64), np.array(begins, np.int64)
        grams = {found.length: found for found in self.ngrams}
        hits = [(length, self._hits(flat, hashes, grams[length])) for length, hashes in windows_of(flat, [*grams])]
        out: dict[int, Overlap] = {}
        for length, places in reversed(hits):
            for at, document in places:
                row = int(np.searchsorted(starts, at, "right")) - 1
                if row not in out:
                    first = at - begins[row]
                    out[row] = Overlap(*self.names[document], " ".join(row_words(texts[row])[first : first + length]))
        return out

    def _hits(self, codes: NDArray[np.uint64], hashes: NDArray[np.uint64], grams: Ngrams) -> list[tuple[int, int]]:
        """Where n-grams of one length begin that a document holds, and which."""
        import numpy as np

        bits = grams.table.size.bit_length() - 1
        places = np.flatnonzero(grams.table[hashes >> np.uint64(64 - bits)])
        entries = np.searchsorted(grams.hashes, hashes[places])
        entries[entries == len(grams.hashes)] = 0
        same = grams.hashes[entries] == hashes[places] if len(grams.hashes) else np.zeros(len(places), bool)
        out = []
        for at, entry in zip(places[same].tolist(), entries[same].tolist(), strict=True):
            start = grams.starts[entry]
            if np.array_equal(self.text[start : start + grams.length], codes[at : at + grams.length]):
                out.append((at, int(grams.documents[entry])))
        return out

    def summary(self) -> dict[str, Any]:
        """As plain data, for the report of the sources."""
        documents = dict(sorted(Counter(task for task, _ in self.names).items()))
        grams = sum(len(grams.hashes) for grams in self.ngrams)
        return {"documents": documents, "too_short": self.short, "ngrams": grams, "common_ngrams": self.common}


def task_documents(tasks: Sequence[str], include_path: str = "", include_digest: str = "") -> Iterator[Document]:
    """The documents of tasks, as `evaluate` would use them, by the tasks' names.

    Args:
        tasks: names of tasks, groups or tags.
        include_path: folder of task files; may be empty.
        include_digest: identity that it must have; may be empty.

    Raises:
        UserError: lm-eval is not installed, a task is unknown, or its data cannot be had.
    """
    if include_path and not Path(include_path).is_dir():
        raise UserError(f"decontaminate.include_path={include_path} is no folder: give a local folder of task files")
    if include_digest and include_digest != identity_of(include_path):
        raise UserError(f"decontaminate.include_path={include_path} is no longer what `check` saw: start the run again")
    try:
        import lm_eval.tasks  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("decontaminate.tasks needs lm-eval: install 'select-moe[eval]'") from None
    from selectmoe.evaluate import task_manager

    manager = task_manager(tasks, include_path)
    for name in tasks:
        try:
            loaded = manager.load([name])["tasks"]
            for task in sorted(loaded):
                for number, doc in enumerate(loaded[task].eval_docs):
                    yield Document(task, str(number), tuple(texts_of(loaded[task], doc)))
        except (OSError, ValueError) as error:  # the hub's and the datasets library's errors are of these kinds
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"decontaminate.tasks: the documents of {name} cannot be had: {reason}") from None


def texts_of(task: Any, doc: Mapping[str, Any]) -> list[str]:
    """The texts of a document that may not stand in a row.

    Args:
        task: lm-eval's.
        doc: its record.

    Returns:
        Its question, question and right answer, and the text fields of its record, each once.
    """
    choices = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else []
    question, target = task.doc_to_text(doc), task.doc_to_target(doc)
    if isinstance(target, int) and 0 <= target < len(choices):
        target = choices[target]
    answers = [str(answer) for answer in (target if isinstance(target, list) else [target])]
    questions = [question] if isinstance(question, str) else [str(choice) for choice in choices]
    both = [f"{one}\n{answer}" for one in questions for answer in answers]
    fields = [value for value in doc.values() if isinstance(value, str)]
    return list(dict.fromkeys([*questions, *both, *fields]))
