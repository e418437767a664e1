"""What every component's body does: call one stage on local paths, hand its outputs on, tell MLflow.

Imported inside the components' functions (their source is all that KFP carries), from the same installation as
`selectmoe`. No command runs it.

A stage writes to `WORK_ROOT/finished/STAGE-KEY` and its files are then linked to where KFP wants them: KFP's local
runner gives every run new folders, so an output that lies only there would be computed again when a run is killed
between the stage's last byte and KFP's own record of it. With an `s3://` work root the stage writes to KFP's folder.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selectmoe import manifest as mf
from selectmoe import sending
from selectmoe.config import StageConfig, load
from selectmoe.errors import Refused, UserError
from selectmoe.progress import quiet

EVENTS = "SELECTMOE_EVENTS"
"""Environment variable: a file to which every executed task adds a line of JSON (a cached task executes nothing)."""

Paths = Mapping[str, str | list[str]]


def run(
    stage: str,
    artifact: Any,
    config: str,
    code: str,
    work_root: str,
    *,
    inputs: Paths,
    values: Mapping[str, Any] | None = None,
) -> None:
    """Run a stage and make its output the content of a KFP artifact.

    Args:
        stage: name of the stage.
        artifact: KFP's output artifact; gets the files and, as metadata, identity and checksum.
        config: resolved configuration (JSON) without paths.
        code: digest of our code.
        work_root: where committed progress lies.
        inputs: dotted configuration name -> path or paths.
        values: further dotted configuration names, what differs from task to task.
    """
    final = Path(artifact.path)
    folder = (
        final
        if work_root.startswith("s3://")
        else Path(work_root, "finished", _name(stage, config, code, inputs, values))
    )
    with sending.sending(work_root):
        try:
            _call(stage, config, folder, work_root, {**inputs, **(values or {})})
        except SystemExit as end:  # an answer that is no is an output all the same
            if end.code == 3 and (folder / mf.NAME).is_file():
                _hand_on(stage, folder, artifact, work_root)
            raise
        _hand_on(stage, folder, artifact, work_root)


def _hand_on(stage: str, output: Path, artifact: Any, work_root: str) -> None:
    final = Path(artifact.path)
    if output != final:
        link_tree(output, final)
    manifest = mf.read_manifest(final, verify=False)
    artifact.metadata.update(stage=stage, identity=manifest.identity, checksum=manifest.checksum)
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
) -> tuple[str]:
    """Run a stage that makes a large checkpoint, which stays under `model_root`.

    Returns:
        The task's output: the checkpoint as ``{"uri", "digest"}`` (JSON). KFP's artifact holds its manifest only.
    """
    folder = Path(model_root, _name(stage, config, code, inputs, None))
    with sending.sending(work_root):
        output = _call(stage, config, folder, work_root, inputs)
        final = Path(artifact.path)
        final.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(output / mf.NAME, final / mf.NAME)
        manifest = mf.read_manifest(output, verify=False)
        artifact.metadata.update(stage=stage, identity=manifest.identity, uri=str(output))
        sending.submit(output, work_root)
    return (json.dumps({"uri": str(output), "digest": manifest.identity}, sort_keys=True),)


def checkpoint(reference: str, verify: bool = False) -> str:
    """The path of a checkpoint that is given as ``{"uri", "digest"}`` (JSON).

    Args:
        reference: the JSON.
        verify: prove every byte; a stage does that itself for each of its inputs, so the manifest is enough for it.

    Raises:
        UserError: nothing lies there, or something else.
    """
    entry = json.loads(reference)
    path = Path(entry["uri"])
    if not path.exists():
        raise UserError(
            f"the checkpoint {path} is gone, but KFP's cache still names it: remove the cache and run again"
        )
    if verify or not (path / mf.NAME).is_file():
        found = mf.identity_of(path)
    else:
        found = mf.read_manifest(path, verify=False).identity
    if found != entry["digest"]:
        raise UserError(f"the checkpoint {path} has changed: its identity is {found[:12]}, not {entry['digest'][:12]}")
    return str(path)


def check(artifact: Any, named: Mapping[str, str], overrides: list[str]) -> tuple[Any, ...]:
    """Run `check` and spread out what it proved.

    Args:
        artifact: KFP's output artifact, for check.json.
        named: settings that are pipeline parameters; an empty one is not given.
        overrides: further `key=value` settings, which win.

    Returns:
        The values of the component's outputs, in their order.
    """
    from selectmoe import check as stage
    from selectmoe.run import compose

    arguments = [f"{key}={value}" for key, value in named.items() if value]
    quiet()
    _note(stage="check")
    with _exit_code("check"):
        config = compose([*arguments, *overrides, f"output_dir={artifact.path}"])
        output = stage.run(config)
    plan = stage.Plan(**json.loads((output / "check.json").read_text(encoding="utf-8")))
    with sending.sending(named["work_root"]):
        sending.submit(output, named["work_root"])
    configs = [json.dumps(plan.stages[name], sort_keys=True) for name in STAGES]
    source, target = (_reference(plan, config, name) for name in ("source_model", "target_model"))
    shards = [f"{index}/{plan.shards}" for index in range(plan.shards)]
    rows = (str(Path(config.data).resolve()), plan.digests["pool"])
    return (*configs, plan.judge, source, target, *rows, plan.digests["code"], plan.arm_seeds, shards)


STAGES = (
    "ingest",
    "upcycle",
    "pretrain",
    "convert",
    "verify",
    "warmup",
    "route",
    "merge",
    "select",
    "baseline",
    "finetune",
    "evaluate",
    "report",
)
"""The stages for which `check` hands on a configuration, in the order of its outputs."""


def planted(config: str, pool: str) -> str:
    """Where `baseline` reads which rows were planted: only the arm oracle may, the others get nothing."""
    return pool if "oracle" in json.loads(config)["arms"] else ""


def arm_rows(selection: str, baselines: str, arm: str, seed: int) -> str:
    """The selection of one arm and seed, from what `select` (arm `selected`) and `baseline` (the others) wrote."""
    from selectmoe.selection import arm_directory

    return str(arm_directory(selection if arm == "selected" else baselines, arm, seed))


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


def _reference(plan: Any, config: Any, name: str) -> str:
    path = getattr(config, name)
    return (
        json.dumps(
            {"uri": str(Path(path).resolve()), "digest": plan.digests[name]},
            sort_keys=True,
        )
        if path
        else ""
    )


def _name(stage: str, config: str, code: str, inputs: Paths, values: Mapping[str, Any] | None) -> str:
    """A folder name that holds everything the result depends on."""
    ids = {key: _identities(value) for key, value in inputs.items() if value}
    return f"{stage}-{mf.digest([stage, json.loads(config), code, ids, dict(values or {})])[:24]}"


def _identities(value: str | list[str]) -> list[str]:
    paths = [value] if isinstance(value, str) else value
    known = [Path(p) for p in paths]
    return sorted(
        mf.read_manifest(p, verify=False).identity if (p / mf.NAME).is_file() else mf.identity_of(p) for p in known
    )


def _call(stage: str, config: str, folder: Path, work_root: str, given: Mapping[str, Any]) -> Path:
    module = importlib.import_module(f"selectmoe.{stage}")
    kind: type[StageConfig] = getattr(module, f"{stage.capitalize()}Config")
    paths = dict(given) | {"output_dir": str(folder), "work_root": work_root}
    quiet()
    _note(stage=stage)
    with _exit_code(stage):
        settings = load(kind, config, **{key: value for key, value in paths.items() if value not in ("", [])})
        output: Path = module.run(settings)
    return output


@contextmanager
def _exit_code(stage: str) -> Iterator[None]:
    """A user's mistake or a refusal ends the task with its own exit code and one line, without a stack trace."""
    try:
        yield
    except (UserError, Refused) as error:
        code = 2 if isinstance(error, UserError) else 3
        _note(stage=stage, exit=code, message=str(error))
        print(f"{stage}: {error}", file=sys.stderr, flush=True)
        sys.exit(code)
    except Exception as error:
        _note(stage=stage, exit=1, message=f"{type(error).__name__}: {error}")
        raise


def _note(**event: Any) -> None:
    if path := os.environ.get(EVENTS):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
