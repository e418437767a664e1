"""An OLMoE checkpoint to a Select-MoE one, every original tensor unchanged.

A shell around `selectmoe convert`: no behaviour of its own. Compiled by `python -m pipelines compile`.
"""

import os
from typing import NamedTuple

from kfp import dsl

IMAGE = os.environ.get("SELECTMOE_IMAGE", "select-moe:0.1.0")


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def convert(
    source: str,
    checkpoint: dsl.Output[dsl.Model],
    model_root: str,
    config: str,
    code: str,
    work_root: str,
) -> NamedTuple("Outputs", [("model", str)]):  # type: ignore[valid-type]  # the form from which KFP reads the outputs
    """An OLMoE checkpoint to a Select-MoE one, every original tensor unchanged.

    Args:
        source: the OLMoE checkpoint as {"uri", "digest"}.
        checkpoint: manifest of the checkpoint, which itself stays under model_root.
        model_root: folder for large checkpoints.
        config: the stage's resolved configuration (JSON), as `check` gives it.
        code: digest of our code: a changed program is a changed task.
        work_root: folder or s3:// URI for committed progress.

    Returns:
        model: the checkpoint as {"uri", "digest"}.
    """
    from components import _shell

    inputs = {"source_model": _shell.checkpoint(source)}
    return _shell.run_checkpoint("convert", checkpoint, config, code, work_root, model_root, inputs=inputs)
