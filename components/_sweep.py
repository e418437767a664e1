"""What `prepare`'s component does: the settings of a sweep to configurations, and what it starts from, proved.

Imported inside the component's function, as `components._shell`. No command runs it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components import _plan
from components._shell import Hardware, task
from selectmoe import manifest as mf
from selectmoe.config import values
from selectmoe.errors import UserError
from selectmoe.storage import open_store

STAGES = ("select", "baseline", "finetune", "evaluate")
ALWAYS = ("selected", "random")
"""Arms of every sweep: the project's own choice, and what every selection has to beat."""


def check(
    router_data: str, pool: str, given: Mapping[str, str | int], config: list[str], hardware: Hardware
) -> tuple[Any, ...]:
    """Prove what a sweep needs and resolve its configurations.

    Args:
        router_data: finished output of `merge` or `route`.
        pool: finished output of `ingest`.
        given: the pipeline's parameters by the names of `_plan.PARAMETERS`.
        config: further `key=value` settings of `selectmoe run`.
        hardware: what the tasks that use an accelerator are to be given.

    Returns:
        The values of the component's outputs, in their order.
    """
    from selectmoe import check as stage
    from selectmoe.compare import CompareConfig

    with task("check", str(given["work_root"])) as record:
        names = str(given["arms"]).strip("[]").replace(" ", "").split(",")
        arms = ",".join([*ALWAYS, *(name for name in names if name and name not in ALWAYS)])
        # nothing is routed here: which scores the router data hold, `select` finds out
        settings, mode = _plan.compose(
            {**given, "arms": arms}, [*config, "route.nll=true", "route.ifd=true"], "checked"
        )
        stages = stage.stage_configs(settings)
        identities = {"router_data": identity(router_data, "route"), "pool": identity(pool, "ingest")}
        target = ""
        if given["seeds"]:
            if not settings.target_model:
                raise UserError("target_model= is missing: what is to be fine-tuned? (or seeds=0: nothing)")
            with tempfile.TemporaryDirectory() as scratch:
                _, found = stage.check_model(settings, "target_model", Path(scratch))
                target = found.reference().to_json()
        seeds = range(settings.seeds if target else 0)
        arm_seeds = [f"{arm}:{seed}" for arm in settings.arms for seed in seeds]
        code = _plan.code(stage.code_digest())
        chosen = {name: stages[name] for name in STAGES}
        chosen["compare"] = values(CompareConfig(), "identity")
        plan = mf.digest([chosen, identities, target, arm_seeds, code])
        record.entry["plan"] = plan
    configs = [json.dumps(value, sort_keys=True) for value in chosen.values()]
    facts = (*identities.values(), target, code, mode, plan, "yes" if target else "no")
    return (*configs, *facts, *_plan.asked(hardware), arm_seeds)


def identity(uri: str, stage: str) -> str:
    """The identity of a finished output of a stage.

    Raises:
        UserError: there is none, or it is another stage's.
    """
    text = open_store(uri).get(mf.NAME)
    if text is None:
        raise UserError(f"{uri} holds no {mf.NAME}: name a finished output of {stage}, folder or s3:// URI")
    manifest = json.loads(text)
    if manifest["stage"] != stage:
        raise UserError(f"{uri} is an output of {manifest['stage']}, not of {stage}")
    return str(manifest["identity"])
