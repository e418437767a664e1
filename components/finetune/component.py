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
    selection: dsl.Input[dsl.Dataset],
    baselines: dsl.Input[dsl.Dataset],
    arm_seed: str,
    adapters: dsl.Output[dsl.Model],
    config: str,
    code: str,
    work_root: str,
) -> None:
    """Stage 3: the target model fine-tuned (LoRA) on one arm's rows with one seed.

    Args:
        target: the target model as {"uri", "digest"}; empty: `source`.
        source: the judge's own source as {"uri", "digest"}.
        selection: what `select` wrote.
        baselines: what `baseline` wrote.
        arm_seed: ARM:SEED.
        adapters: the final adapter and checkpoint-*/.
        config: the stage's resolved configuration (JSON), as `check` gives it.
        code: digest of our code: a changed program is a changed task.
        work_root: folder or s3:// URI for committed progress.
    """
    from components import _shell

    arm, seed = arm_seed.rsplit(":", 1)
    inputs = {
        "training.model": _shell.checkpoint(target or source),
        "dataset.data_path": _shell.arm_rows(selection.path, baselines.path, arm, int(seed)),
        "reference": selection.path,
    }
    values = {"arm": arm, "seed": int(seed)}
    _shell.run("finetune", adapters, config, code, work_root, inputs=inputs, values=values)
