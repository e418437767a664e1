"""Datasets on the Hugging Face hub as sources: streamed by the datasets library, at a commit that was resolved first.

    selectmoe ingest data=hf://OWNER/NAME output_dir=out/ingest
    selectmoe ingest dataset.dataset_from=hf dataset.hf.datasets=[{path:OWNER/NAME,name:mine,split:train}] output_dir=out/ingest

Nothing is downloaded as a whole: rows come as they are read, shard by shard, several shards at the same time. A branch
or tag is resolved to its commit before anything is read; the commit is what is read, what the manifest records, and with
configuration and split the input's identity. The library gives every row of a dataset the same fields and types, so a
record arrives as the library sees it; fields without a value count as absent. No code of a dataset's is run.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from selectmoe.cache import HUB_NAME
from selectmoe.errors import Unavailable, UserError
from selectmoe.manifest import digest
from selectmoe.pool import DATASET_NAME
from selectmoe.sources import Dataset

SCHEME = "hf://"
KEYS = ("path", "name", "split", "config", "revision")


def check_entries(entries: Sequence[Mapping[str, str]]) -> None:
    """Check `dataset.hf.datasets` as far as the hub need not be asked.

    Raises:
        UserError: a key is unknown, a value is missing or malformed, or two datasets have one name.
    """
    names = [_wanted(entry)["name"] for entry in entries]
    if not names:
        raise UserError("dataset.hf.datasets is empty: give [{path:OWNER/NAME,name:mine,split:train}]")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"dataset.hf.datasets: two are called {twice[0]}: give each a name of its own")


def _wanted(entry: Mapping[str, str]) -> dict[str, str]:
    """An entry of `dataset.hf.datasets` with its defaults."""
    shown = ",".join(f"{key}:{value}" for key, value in entry.items())
    if unknown := sorted(set(entry) - set(KEYS)):
        raise UserError(f"dataset.hf.datasets: {{{shown}}} has the unknown key {unknown[0]}; known: {', '.join(KEYS)}")
    path = str(entry.get("path", ""))
    if not HUB_NAME.fullmatch(path):
        raise UserError(f"dataset.hf.datasets: {{{shown}}} must have a path of the form OWNER/NAME")
    given = {key: str(entry.get(key) or "") for key in KEYS}
    wanted = given | {"name": given["name"] or path.partition("/")[2], "split": given["split"] or "train"}
    if not DATASET_NAME.fullmatch(wanted["name"]):
        raise UserError(
            f"dataset.hf.datasets: the name {wanted['name']!r} must be 1 to 64 of A-Z a-z 0-9 . _ - and not begin with a dot"
        )
    return wanted


@dataclass(frozen=True)
class HubStream:
    """One of the shards of a dataset on the hub."""

    path: str
    config: str
    split: str
    commit: str
    index: int
    count: int

    @property
    def place(self) -> str:
        """The split, and which of its shards."""
        return self.split if self.count == 1 else f"{self.split}-{self.index:05d}-of-{self.count:05d}"

    @property
    def uri(self) -> str:
        """The dataset at its commit."""
        return f"{SCHEME}{self.path}@{self.commit}"

    def records(self) -> Iterator[Mapping[str, Any]]:
        """The shard's rows.

        Raises:
            UserError: a file of it cannot be read.
            Unavailable: the hub does not answer, after retries.
        """
        with hub_answers(self.uri):
            rows = _load(self.path, self.config, self.split, self.commit)
            yield from rows.shard(num_shards=self.count, index=self.index) if self.count > 1 else rows

    def check(self) -> None:
        """A commit does not change."""


def hub_datasets(entries: Sequence[Mapping[str, str]]) -> dict[str, Dataset]:
    """The datasets of `dataset.hf.datasets`, by name.

    Raises:
        UserError: the hub has no such dataset, revision, configuration or split, or does not give it to us.
        Unavailable: the hub does not answer.
    """
    return {dataset.name: dataset for dataset in sorted(map(_dataset, entries), key=lambda found: found.name)}


def one_dataset(data: str) -> dict[str, Dataset]:
    """The split `train` of `hf://OWNER/NAME[@REVISION]`, under the dataset's own name.

    Raises:
        UserError, Unavailable: as `hub_datasets`.
    """
    path, _, revision = data.removeprefix(SCHEME).partition("@")
    if not HUB_NAME.fullmatch(path):
        raise UserError(f"data={data} is not of the form hf://OWNER/NAME[@REVISION]")
    found = _dataset({"path": path, "revision": revision})
    return {found.name: found}


def _dataset(entry: Mapping[str, str]) -> Dataset:
    wanted = _wanted(entry)
    path, config, split, revision = (wanted[key] for key in ("path", "config", "split", "revision"))
    uri = f"{SCHEME}{path}@{revision}" if revision else f"{SCHEME}{path}"
    with hub_answers(uri):
        from huggingface_hub import HfApi

        hub = HfApi()
        commit = str(hub.dataset_info(path, revision=revision or None).sha)
        hub.auth_check(
            path, repo_type="dataset"
        )  # datasets' own error does not say what is gated and what is not there
        count = _load(path, config, split, commit).num_shards
    streams = [HubStream(path, config, split, commit, index, count) for index in range(count)]
    read = functools.partial(digest, {"commit": commit, "config": config, "split": split})
    return Dataset(wanted["name"], streams[0].uri, read, streams)


def _load(path: str, config: str, split: str, commit: str) -> Any:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise UserError("hf:// needs the package datasets: install 'select-moe[data]'") from None
    return load_dataset(path, config or None, split=split, revision=commit, streaming=True)


@contextmanager
def hub_answers(uri: str) -> Iterator[None]:
    """Turn the errors of the hub's libraries into one line.

    Raises:
        UserError: the dataset is gated, private, unknown, or not what was asked for; or the hub is switched off.
        Unavailable: the hub does not answer, after the libraries' retries.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if found := _meaning(uri, error):
            raise found from None
        raise


def _meaning(uri: str, error: Exception) -> Exception | None:
    """What an error of datasets, of the hub's client below it or of Arrow means; None for one that is of none of them.

    The library words the client's errors anew, so what caused an error tells more than its text.
    """
    import httpx2  # what huggingface_hub speaks HTTP with
    import pyarrow as pa
    from huggingface_hub import errors as hub

    path, _, revision = uri.removeprefix(SCHEME).partition("@")
    causes: list[BaseException] = [error]
    while cause := causes[-1].__cause__:
        causes.append(cause)

    def of(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if of(hub.OfflineModeIsEnabled):
        return UserError(f"{uri}: the hub is switched off (HF_HUB_OFFLINE): unset it, or name local files")
    if of(hub.GatedRepoError):
        return UserError(f"{uri} is gated: accept its terms on the hub and set HF_TOKEN to a token that may read it")
    if of(hub.RevisionNotFoundError):
        return UserError(f"{uri}: the hub's dataset {path} has no revision {revision}")
    if of(hub.RepositoryNotFoundError):
        return UserError(f"{uri}: the hub has no dataset {path}, or it is private: look at the name, or set HF_TOKEN")
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    statuses = [cause.response.status_code for cause in causes if isinstance(cause, hub.HfHubHTTPError)]
    if of(httpx2.TransportError) or any(status >= 500 or status == 429 for status in statuses):
        return Unavailable(f"{uri}: the hub does not answer ({reason}): try again later")
    if isinstance(error, OSError | ValueError | pa.ArrowException) or type(error).__module__.startswith("datasets."):
        return UserError(f"{uri} cannot be read as a dataset: {reason}")
    return None
