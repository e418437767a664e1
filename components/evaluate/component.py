"""Stage 4: held-out loss (and benchmark tasks) of the target model, with or without an adapter.

A shell around `selectmoe evaluate`: no behaviour of its own. Compiled by `python -m pipelines compile`.
"""

import os

from kfp import dsl

IMAGE = os.environ.get("SELECTMOE_IMAGE", "select-moe:0.1.0")


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def evaluate(
    target: str,
    source: str,
    pool: dsl.Input[dsl.Dataset],
    arm_seed: str,
    evaluation: dsl.Output[dsl.Dataset],
    config: str,
    code: str,
    work_root: str,
    accelerator: str,
    accelerators: str,
    memory: str,
    adapters: dsl.Input[dsl.Model] = None,
) -> None:
    """Stage 4: held-out loss (and benchmark tasks) of the target model, with or without an adapter.

    Args:
        target: the target model as {"uri", "digest"}; empty: `source`.
        source: the judge's own source as {"uri", "digest"}.
        pool: what `ingest` wrote: its holdout.
        arm_seed: ARM:SEED; base:0 without an adapter.
        evaluation: results.parquet, evaluation.json.
        adapters: what `finetune` wrote; absent: the base model.
        config: the stage's resolved configuration (JSON), as `check` gives it.
        code: digest of our code: a changed program is a changed task.
        work_root: folder or s3:// URI for committed progress.
        accelerator: resource name of the accelerator that the task was given; empty: none.
        accelerators: how many; where there are some, torch must see one.
        memory: what the task was given; counts in the run's cost.
    """
    from components import _shell

    arm, seed = arm_seed.rsplit(":", 1)
    inputs = {
        "model": _shell.checkpoint(target or source),
        "holdout": pool.path,
        "adapters": [adapters.path] if adapters else [],
    }
    values = {"arm": arm, "seed": int(seed)}
    hardware = _shell.Hardware(accelerator, int(accelerators), memory)
    _shell.run("evaluate", evaluation, config, code, work_root, inputs=inputs, values=values, hardware=hardware)
