"""A pool to a small OLMoE of the user's own.

A shell around `selectmoe pretrain`: no behaviour of its own. Compiled by `python -m pipelines compile`.
"""

import os
from typing import NamedTuple

from kfp import dsl

IMAGE = os.environ.get("SELECTMOE_IMAGE", "select-moe:0.1.0")


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def pretrain(
    pool: dsl.Input[dsl.Dataset],
    checkpoint: dsl.Output[dsl.Model],
    model_root: str,
    config: str,
    code: str,
    work_root: str,
    accelerator: str,
    accelerators: str,
    memory: str,
) -> NamedTuple("Outputs", [("model", str)]):  # type: ignore[valid-type]  # the form from which KFP reads the outputs
    """A pool to a small OLMoE of the user's own.

    Args:
        pool: what `ingest` wrote.
        checkpoint: manifest of the checkpoint, which itself stays under model_root.
        model_root: folder for large checkpoints.
        config: the stage's resolved configuration (JSON), as `check` gives it.
        code: digest of our code: a changed program is a changed task.
        work_root: folder or s3:// URI for committed progress.
        accelerator: resource name of the accelerator that the task was given; empty: none.
        accelerators: how many; where there are some, torch must see one.
        memory: what the task was given; counts in the run's cost.

    Returns:
        model: the checkpoint as {"uri", "digest"}.
    """
    from components import _shell

    inputs = {"data": pool.path}
    hardware = _shell.Hardware(accelerator, int(accelerators), memory)
    return _shell.run_checkpoint(
        "pretrain", checkpoint, config, code, work_root, model_root, inputs=inputs, hardware=hardware
    )
