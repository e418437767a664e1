"""What `check`'s component does: the pipeline's parameters to the configuration of a run, and that to the chain's.

Imported inside the component's function, as `components._shell`. No command runs it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components._shell import Hardware, describe, refusals, task
from selectmoe import manifest as mf
from selectmoe import sending
from selectmoe.cache import Reference, is_remote
from selectmoe.errors import UserError
from selectmoe.storage import prove_store

if TYPE_CHECKING:
    from selectmoe.run import RunConfig

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
HERE = Path(__file__).parent
PARAMETERS = {
    "preset": "preset",
    "data": "data",
    "source_model": "source_model",
    "target_model": "target_model",
    "budget": "budget",
    "arms": "arms",
    "seeds": "seeds",
    "tasks": "evaluate.tasks",
    "shards": "shards",
    "accelerator_type": "accelerator.type",
    "accelerator_count": "accelerator.count",
    "memory": "accelerator.memory",
    "gate": "report.gate",
    "work_root": "work_root",
}
"""Parameter of the pipeline -> key of `selectmoe run`; the parameter's empty value leaves the key to the preset."""
LISTS = ("arms", "tasks")
"""Parameters that hold several names, separated by commas; brackets around them do no harm."""


def check(artifact: Any, given: Mapping[str, str | int], config: list[str], hardware: Hardware) -> tuple[Any, ...]:
    """Run `check` and spread out what it proved.

    Args:
        artifact: KFP's output artifact, for check.json.
        given: the pipeline's parameters by their names.
        config: further `key=value` settings of `selectmoe run`.
        hardware: what the tasks that use an accelerator are to be given.

    Returns:
        The values of the component's outputs, in their order.
    """
    from selectmoe import check as stage

    work_root = str(given["work_root"])
    if is_remote(work_root):
        with refusals("check"):  # quickly: a record in it would be tried again and again
            prove_store(work_root)
    with task("check", work_root) as record:
        settings, mode = compose(given, config, artifact.path)
        if settings.dry_run:
            raise UserError("dry_run=true: a pipeline is not run to do nothing; give it to selectmoe run")
        output = stage.run(settings)
        found = stage.Plan(**json.loads((output / "check.json").read_text(encoding="utf-8")))
        record.entry["plan"] = plan_key(found)
        artifact.metadata.update(describe(output), plan=plan_key(found))
        sending.submit(output, work_root)
    configs = [json.dumps(found.stages[name], sort_keys=True) for name in STAGES]
    source, target = (_reference(found, name) for name in ("source_model", "target_model"))
    data = settings.data if is_remote(settings.data) else str(Path(settings.data).resolve())
    rows = (data, found.digests["pool"])
    shards = [f"{index}/{found.shards}" for index in range(found.shards)]
    loops = (found.arm_seeds, shards)
    chain = (
        found.judge,
        source,
        target,
        *rows,
        code(found.digests["code"]),
        settings.model_root,
        mode,
        plan_key(found),
    )
    return (*configs, *chain, *asked(hardware), *loops)


def compose(given: Mapping[str, str | int], config: list[str], output_dir: str) -> tuple[RunConfig, str]:
    """The configuration of a run as the pipeline does it, and the gate's mode.

    The report is the same whatever the gate says of it: in the pipeline, a step of its own says it.

    Raises:
        UserError: a setting is wrong.
    """
    from selectmoe.run import compose as compose_run

    settings = compose_run([*overrides(given, config), f"output_dir={output_dir}"])
    settings.model_root = settings.model_root or f"{given['work_root']}/models"
    mode, settings.report.gate = settings.report.gate, "off"
    return settings, mode


def overrides(given: Mapping[str, str | int], config: list[str]) -> list[str]:
    """The pipeline's parameters and its `config` as `key=value` settings of `selectmoe run`.

    Raises:
        UserError: `config` sets what is a parameter of the pipeline.
    """
    names = {key: parameter for parameter, key in PARAMETERS.items()}
    for item in config:
        if parameter := names.get(item.partition("=")[0]):
            raise UserError(f"config: {item} is set by the pipeline's own parameter {parameter}: give it there")
    words = [
        f"{PARAMETERS[name]}=" + ("[" + str(value).strip("[]") + "]" if name in LISTS else str(value))
        for name, value in given.items()
        if value not in ("", 0)
    ]
    return [*words, *config]


def code(program: str) -> str:
    """Digest of our code: of the package's, and of what the components do beside it."""
    return mf.digest([program, *(mf.sha256_file(path) for path in sorted(HERE.glob("*.py")))])


def asked(hardware: Hardware) -> tuple[str, str, str]:
    """What KFP is to ask for: no type of accelerator where none is wanted, and numbers as text, which it wants here."""
    return (hardware.accelerator if hardware.count else "", str(hardware.count), hardware.memory)


def plan_key(plan: Any) -> str:
    """Digest of what is to be done: runs with the same one have the same report."""
    return mf.digest([plan.stages, plan.digests, plan.arm_seeds, plan.judge])


def _reference(plan: Any, name: str) -> str:
    return Reference(plan.uris[name], plan.digests[name]).to_json() if name in plan.uris else ""
