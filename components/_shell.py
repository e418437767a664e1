"""What every component's body does: call one stage on local paths, hand its outputs on, tell MLflow.

Imported inside the components' functions (their source is all that KFP carries), from the same installation as
`selectmoe`. No command runs it.

A stage writes to `WORK_ROOT/finished/STAGE-KEY` and its files are then linked to where KFP wants them: KFP's local
runner gives every run new folders, so an output that lies only there would be computed again when a run is killed
between the stage's last byte and KFP's own record of it. With an `s3://` work root the stage writes to KFP's folder.

A large checkpoint is made below `model_root`; where that is `s3://`, it is made in this node's model cache and stored
from there, and other nodes bring it into theirs (`selectmoe.cache`).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from selectmoe import cache, runlog, sending
from selectmoe import manifest as mf
from selectmoe.config import StageConfig, load
from selectmoe.errors import Refused, Unavailable, UserError
from selectmoe.progress import quiet
from selectmoe.sources import data_identity
from selectmoe.stage import METRICS

EXIT_CODES: dict[type[Exception], int] = {UserError: 2, Refused: 3, Unavailable: 1}
EVENTS = "SELECTMOE_EVENTS"
"""Environment variable: a file to which every executed task adds a line of JSON (a cached task executes nothing)."""

Paths = Mapping[str, str | list[str]]


@dataclass(frozen=True)
class Hardware:
    """What a task that uses an accelerator was given: resource name, how many (0: none), memory as a quantity."""

    accelerator: str
    count: int
    memory: str


def run(
    stage: str,
    artifact: Any,
    config: str,
    code: str,
    work_root: str,
    *,
    inputs: Paths,
    values: Mapping[str, Any] | None = None,
    hardware: Hardware | None = None,
    unchanged: Mapping[str, str] | None = None,
) -> None:
    """Run a stage and make its output the content of a KFP artifact.

    Args:
        stage: name of the stage.
        artifact: KFP's output artifact; gets the files and, as metadata, what `describe` says.
        config: resolved configuration (JSON) without paths.
        code: digest of our code.
        work_root: where committed progress lies.
        inputs: dotted configuration name -> path or paths.
        values: further dotted configuration names, what differs from task to task.
        hardware: what the task was given, where it uses an accelerator.
        unchanged: path -> digest of what `check` saw there; anything else is a mistake of the user's.
    """
    final = Path(artifact.path)
    with task(stage, work_root, hardware):
        for path, digest in (unchanged or {}).items():
            if data_identity(path) != digest:
                raise UserError(f"{path} has changed since `check` read it: start the run again")
        try:
            _to_artifact(stage, final, config, code, work_root, inputs, values)
        finally:  # an answer that is no is an output all the same
            if (final / mf.NAME).is_file():
                artifact.metadata.update(describe(final))
                sending.submit(final, work_root)


def run_checkpoint(
    stage: str,
    artifact: Any,
    config: str,
    code: str,
    work_root: str,
    model_root: str,
    *,
    inputs: Paths,
    hardware: Hardware | None = None,
) -> tuple[str]:
    """Run a stage that makes a large checkpoint, which stays under `model_root`.

    Returns:
        The task's output: the checkpoint as ``{"uri", "digest"}`` (JSON). KFP's artifact holds its manifest only.
    """
    name, final = _name(stage, config, code, inputs, None), Path(artifact.path)
    with task(stage, work_root, hardware):
        output, reference = _made(stage, config, name, work_root, model_root, inputs)
        final.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(output / mf.NAME, final / mf.NAME)
        artifact.metadata.update(describe(output), uri=reference.uri)
        sending.submit(output, work_root)
    return (reference.to_json(),)


def _made(
    stage: str, config: str, name: str, work_root: str, model_root: str, inputs: Paths
) -> tuple[Path, cache.Reference]:
    """The folder of a large checkpoint on this machine, and its reference; made where it is not there yet."""
    if not model_root.startswith("s3://"):
        output = _call(stage, config, Path(model_root, name), work_root, inputs)
        return output, cache.Reference(str(output), mf.read_manifest(output, verify=False).identity)
    uri, folder = f"{model_root.rstrip('/')}/{name}", cache.root() / "made" / name
    reference = cache.stored(uri)
    if reference and not (folder / mf.NAME).is_file():
        return cache.fetch(reference), reference
    output = _call(stage, config, folder, work_root, inputs)
    reference = cache.store(output, uri)
    return cache.adopt(output, reference.digest), reference


def run_selections(
    artifact: Any, select_config: str, baseline_config: str, code: str, work_root: str, *, router_data: str, pool: str
) -> None:
    """Run `select` and `baseline`: the selections of all arms in one artifact, a manifest per arm.

    The folder is what `baseline` wrote, with what `select` wrote in it as `selected/` (an output of its own).
    """
    final = Path(artifact.path)
    rows: dict[str, str | list[str]] = {"router_data_dir": router_data, "data": pool}
    with task("select", work_root):
        _to_artifact("baseline", final, baseline_config, code, work_root, rows | planted(baseline_config, pool), None)
        _to_artifact("select", final / SELECTED, select_config, code, work_root, rows, None)
        artifact.metadata.update(describe(final / SELECTED))
        artifact.metadata["identity_of_baselines"] = describe(final)["identity"]
        sending.submit(final / SELECTED, work_root)
        sending.submit(final, work_root)


def describe(output: Path) -> dict[str, str | int | float]:
    """What KFP's page shows of an output: stage, identity and checksum, rows, bytes and the last value of each metric."""
    manifest = mf.read_manifest(output, verify=False)
    shown: dict[str, str | int | float] = {
        "stage": manifest.stage,
        "identity": manifest.identity,
        "checksum": manifest.checksum,
        "rows_in": manifest.rows["in"],
        "rows_out": manifest.rows["out"],
        "bytes": sum(file["bytes"] for file in manifest.files),
    }
    shown |= {f"dropped_{reason}": n for reason, n in manifest.rows["dropped"].items()}
    if (output / METRICS).is_file():
        for entry in map(json.loads, (output / METRICS).read_text(encoding="utf-8").splitlines()):
            shown[f"metric_{entry['name']}"] = entry["value"]
    return shown


def adopt(source: str, code: str, work_root: str) -> tuple[str]:
    """Prove every byte of a checkpoint of the user's own, and hand it on as it is."""
    with task("adopt", work_root) as record:
        record.entry["code"] = code
        cache.fetch(cache.Reference(**json.loads(source)), verify=True)
    return (source,)


def reuse(uri: str, identity: str, artifact: Any, code: str, work_root: str) -> None:
    """Hand on a finished output of another run, every byte of it proved."""
    from selectmoe.storage import open_store

    final = Path(artifact.path)
    with task("reuse", work_root) as record:
        record.entry["code"] = code
        store = open_store(uri)
        for name in store.names():
            store.fetch(name, final / name)
        found = mf.read_manifest(final).identity
        if found != identity:
            raise UserError(f"{uri} has changed since `check` read it: its identity is {found[:12]}")
        artifact.metadata.update(describe(final), source=uri)


def planted_rows(pool: str) -> str:
    """The file that says which rows of a pool were planted; empty: none were."""
    path = Path(pool, "planted.jsonl")
    return str(path) if path.is_file() else ""


def checkpoint(reference: str) -> str:
    """The folder on this machine of a checkpoint that is given as ``{"uri", "digest"}`` (JSON).

    What comes from S3 is proved when it is brought here; a stage proves each of its inputs itself. A checkpoint that is
    gone or has changed ends the task.
    """
    try:
        return str(cache.fetch(cache.Reference(**json.loads(reference))))
    except (UserError, Unavailable) as error:  # before the task's own frame
        _end("checkpoint", error)


SELECTED = "selected"
"""The arm that `select` makes, and its folder among the selections."""


def planted(config: str, pool: str) -> dict[str, str]:
    """What tells `baseline` which rows were planted: only the arm oracle may know, the others get nothing."""
    return {"planted": pool} if "oracle" in json.loads(config)["arms"] else {}


def arm_rows(selections: str, arm: str, seed: int) -> str:
    """The selection of one arm and seed among those of all arms."""
    from selectmoe.selection import arm_directory

    return str(arm_directory(selections, arm, seed))


def link_tree(source: Path, target: Path) -> None:
    """Give the files of `source` a second name below `target` (a copy where the file system has no hard links)."""
    for path in sorted(source.rglob("*")):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        try:
            os.link(path, place)
        except OSError:
            shutil.copyfile(path, place)


def _name(stage: str, config: str, code: str, inputs: Paths, values: Mapping[str, Any] | None) -> str:
    """A folder name that holds everything the result depends on."""
    ids = {key: _identities(value) for key, value in inputs.items() if value}
    return f"{stage}-{mf.digest([stage, json.loads(config), code, ids, dict(values or {})])[:24]}"


def _identities(value: str | list[str]) -> list[str]:
    return sorted(_identity(place) for place in ([value] if isinstance(value, str) else value))


def _identity(place: str) -> str:
    """Of an output its manifest's, unproved: the stage proves every input itself."""
    if not cache.is_remote(place) and (Path(place) / mf.NAME).is_file():
        return mf.read_manifest(place, verify=False).identity
    return cache.identity_of(place)


def _to_artifact(
    stage: str,
    final: Path,
    config: str,
    code: str,
    work_root: str,
    inputs: Paths,
    values: Mapping[str, Any] | None,
) -> None:
    """Run a stage where it finds its own finished output again, and give its files a second name below `final`."""
    folder = (
        final
        if work_root.startswith("s3://")
        else Path(work_root, "finished", _name(stage, config, code, inputs, values))
    )
    try:
        _call(stage, config, folder, work_root, {**inputs, **(values or {})})
    finally:  # also where the answer is no
        if folder != final and (folder / mf.NAME).is_file():
            link_tree(folder, final)


def _call(stage: str, config: str, folder: Path, work_root: str, given: Mapping[str, Any]) -> Path:
    module = importlib.import_module(f"selectmoe.{stage}")
    kind: type[StageConfig] = getattr(module, f"{stage.capitalize()}Config")
    paths = dict(given) | {"output_dir": str(folder), "work_root": work_root}
    settings = load(kind, config, **{key: value for key, value in paths.items() if value not in ("", [])})
    output: Path = module.run(settings)
    return output


@contextmanager
def task(stage: str, work_root: str, hardware: Hardware | None = None) -> Iterator[runlog.Record]:
    """The frame of a task: what it was given, when, and how it ended.

    A user's mistake or a refusal ends the task with its own exit code and one line, without a stack trace.
    """
    quiet()
    note(stage=stage)
    with refusals(stage):
        record = runlog.Record(work_root, stage, **(dataclasses.asdict(hardware) if hardware else {}))
    try:
        if hardware:
            _prove(hardware)
        with sending.sending(work_root):
            yield record
    except tuple(EXIT_CODES) as error:
        record.end(EXIT_CODES[type(error)], str(error))
        _end(stage, error)
    except Exception as error:
        note(stage=stage, exit=1, message=f"{type(error).__name__}: {error}")
        record.end(1, f"{type(error).__name__}: {error}")
        raise
    record.end()


@contextmanager
def refusals(stage: str) -> Iterator[None]:
    """What is refused before the work root can take a record ends the task all the same, in one line."""
    try:
        yield
    except tuple(EXIT_CODES) as error:
        _end(stage, error)


def _end(stage: str, error: Exception) -> NoReturn:
    note(stage=stage, exit=EXIT_CODES[type(error)], message=str(error))
    print(f"{stage}: {error}", file=sys.stderr, flush=True)
    sys.exit(EXIT_CODES[type(error)])


def _prove(hardware: Hardware) -> None:
    """A task that was given an accelerator has one.

    Raises:
        RuntimeError: torch sees none: the work would silently be done on the CPU.
    """
    if hardware.count:
        from selectmoe.device import pick_device

        if pick_device().type == "cpu":
            raise RuntimeError(
                f"{hardware.count} of {hardware.accelerator} were asked for, but torch sees no device: "
                "the image lacks its libraries, or the node its driver"
            )


def note(**event: Any) -> None:
    if path := os.environ.get(EVENTS):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
