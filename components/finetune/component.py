"""Stage 3: the target model fine-tuned (LoRA) on one arm's rows with one seed.

A shell around `selectmoe finetune`: no behaviour of its own. Compiled by `python -m pipelines compile`.
"""

import os

from kfp import dsl

IMAGE = os.environ.get("SELECTMOE_IMAGE", "select-moe:0.1.0")


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def finetune(
    target: str,
    source: str,
    selections: dsl.Input[dsl.Dataset],
    arm_seed: str,
    adapters: dsl.Output[dsl.Model],
    config: str,
    code: str,
    work_root: str,
    accelerator: str,
    accelerators: str,
    memory: str,
) -> None:
    """Stage 3: the target model fine-tuned (LoRA) on one arm's rows with one seed.

    Args:
        target: the target model as {"uri", "digest"}; empty: `source`.
        source: the judge's own source as {"uri", "digest"}.
        selections: what `select` wrote.
        arm_seed: ARM:SEED.
        adapters: the final adapter and checkpoint-*/.
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
        "training.model": _shell.checkpoint(target or source),
        "dataset.data_path": _shell.arm_rows(selections.path, arm, int(seed)),
        "reference": _shell.arm_rows(selections.path, _shell.SELECTED, int(seed)),
    }
    values = {"arm": arm, "seed": int(seed)}
    hardware = _shell.Hardware(accelerator, int(accelerators), memory)
    _shell.run("finetune", adapters, config, code, work_root, inputs=inputs, values=values, hardware=hardware)
