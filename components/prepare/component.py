"""The settings of a sweep to proved prerequisites and one resolved configuration per stage; never cached.

Compiled by `python -m pipelines compile`.
"""

import os
from typing import NamedTuple

from kfp import dsl

IMAGE = os.environ.get("SELECTMOE_IMAGE", "select-moe:0.1.0")


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def prepare(
    preset: str,
    router_data: str,
    pool: str,
    settings: str,
    budget: str,
    target_model: str,
    seeds: int,
    tasks: str,
    accelerator_type: str,
    accelerator_count: int,
    memory: str,
    gate: str,
    work_root: str,
    config: list,  # type: ignore[type-arg]  # KFP knows only the bare name
) -> NamedTuple(  # type: ignore[valid-type]  # the form from which KFP reads the outputs
    "Checked",
    [
        ("select", str),
        ("baseline", str),
        ("finetune", str),
        ("evaluate", str),
        ("compare", str),
        ("router_identity", str),
        ("pool_identity", str),
        ("target", str),
        ("code", str),
        ("mode", str),
        ("plan", str),
        ("tuned", str),
        ("accelerator", str),
        ("accelerators", str),
        ("asked_memory", str),
        ("arm_seeds", list),
    ],
):
    """The settings of a sweep to proved prerequisites and one resolved configuration per stage.

    Args:
        preset: size of everything; the other settings start from it.
        router_data: finished output of `merge` or `route`, folder or s3:// URI.
        pool: finished output of `ingest` that was routed, folder or s3:// URI.
        settings: arms with their settings, separated by commas, such as kmeans+drop-0.2,top-nll.
        budget: how much is selected: 0.05 (share), 100 (rows) or 50000t (learned tokens); empty: the preset's.
        target_model: the model to fine-tune on every selection; not needed where seeds is 0.
        seeds: training seeds per selection; 0: nothing is fine-tuned.
        tasks: lm-eval tasks beside the held-out rows, separated by commas; empty: the preset's.
        accelerator_type: resource name of the accelerator.
        accelerator_count: accelerators per task that uses one; 0: none is asked for.
        memory: memory of a task that uses the accelerator.
        gate: off, warn or fail; empty: the preset's.
        work_root: folder or s3:// URI for committed progress.
        config: further `key=value` settings of `selectmoe run`.

    Returns:
        One resolved configuration per stage (JSON); the identities of router data and pool; the target as
        {"uri", "digest"}; digests of our code and of the plan; the gate's mode; yes where models are fine-tuned; what
        a task that uses an accelerator asks for; the loop items ARM:SEED.
    """
    from components import _shell, _sweep

    sizes: dict[str, str | int] = {
        "budget": budget,
        "arms": settings,
        "seeds": seeds,
        "tasks": tasks,
        "target_model": target_model,
    }
    given = {"preset": preset, **sizes, "gate": gate, "work_root": work_root}
    hardware = _shell.Hardware(accelerator_type, accelerator_count, memory)
    return _sweep.check(router_data, pool, given, config, hardware)
