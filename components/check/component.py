"""The configuration of a whole run to proved prerequisites, digests, and one resolved configuration per stage.

A shell around `selectmoe check`, never cached: what it returns *as parameters* is what every later task is cached on.
Compiled by `python -m pipelines compile`.
"""

import os
from typing import NamedTuple

from kfp import dsl

IMAGE = os.environ.get("SELECTMOE_IMAGE", "select-moe:0.1.0")


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def check(
    checked: dsl.Output[dsl.Dataset],
    preset: str,
    data: str,
    source_model: str,
    target_model: str,
    budget: str,
    arms: str,
    seeds: int,
    tasks: str,
    shards: int,
    accelerator_type: str,
    accelerator_count: int,
    memory: str,
    gate: str,
    work_root: str,
    config: list,  # type: ignore[type-arg]  # KFP knows only the bare name
) -> NamedTuple(  # type: ignore[valid-type]  # the form from which KFP reads the outputs
    "Checked",
    [
        ("ingest", str),
        ("upcycle", str),
        ("pretrain", str),
        ("convert", str),
        ("verify", str),
        ("warmup", str),
        ("route", str),
        ("merge", str),
        ("select", str),
        ("baseline", str),
        ("finetune", str),
        ("evaluate", str),
        ("report", str),
        ("judge", str),
        ("source", str),
        ("target", str),
        ("rows", str),
        ("pool_digest", str),
        ("code", str),
        ("model_root", str),
        ("mode", str),
        ("plan", str),
        ("accelerator", str),
        ("accelerators", str),
        ("asked_memory", str),
        ("arm_seeds", list),
        ("route_shards", list),
    ],
):
    """The configuration of a whole run to proved prerequisites, digests, and one resolved configuration per stage.

    Args:
        checked: check.json.
        preset: size of everything; the other settings start from it.
        data: the user's own rows; empty: the preset's.
        source_model: what the judge is made from; empty: the preset's.
        target_model: the model to fine-tune; empty: the preset's.
        budget: how much is selected: 0.05 (share), 100 (rows) or 50000t (learned tokens); empty: the preset's.
        arms: what is compared, separated by commas; empty: the preset's.
        seeds: training seeds per arm; 0: the preset's.
        tasks: lm-eval tasks beside the held-out rows, separated by commas; empty: the preset's.
        shards: tasks that share the routing.
        accelerator_type: resource name of the accelerator.
        accelerator_count: accelerators per task that uses one; 0: none is asked for.
        memory: memory of a task that uses the accelerator.
        gate: off, warn or fail; empty: the preset's.
        work_root: folder or s3:// URI for committed progress.
        config: further `key=value` settings of `selectmoe run`.

    Returns:
        One resolved configuration per stage (JSON); judge: upcycle, pretrain or olmoe; source, target: checkpoints as
        {"uri", "digest"}; rows: where the pool's rows lie; digests of these, of our code and of the plan; where large
        checkpoints go; the gate's mode; what a task that uses an accelerator asks for; the loop items ARM:SEED and
        INDEX/COUNT.
    """
    from components import _plan, _shell

    models = {"source_model": source_model, "target_model": target_model}
    sizes: dict[str, str | int] = {"budget": budget, "arms": arms, "seeds": seeds, "tasks": tasks, "shards": shards}
    given = {"preset": preset, "data": data, **models, **sizes, "gate": gate, "work_root": work_root}
    asked: dict[str, str | int] = {"accelerator_type": accelerator_type, "accelerator_count": accelerator_count}
    hardware = _shell.Hardware(accelerator_type, accelerator_count, memory)
    return _plan.check(checked, {**given, **asked, "memory": memory}, config, hardware)
