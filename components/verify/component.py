"""Proof that conversion changed nothing it should not.

A shell around `selectmoe verify`: no behaviour of its own. Compiled by `python -m pipelines compile`.
"""

import os

from kfp import dsl

IMAGE = os.environ.get("SELECTMOE_IMAGE", "select-moe:0.1.0")


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def verify(
    source: str,
    converted: str,
    proof: dsl.Output[dsl.Dataset],
    config: str,
    code: str,
    work_root: str,
) -> None:
    """Proof that conversion changed nothing it should not.

    Args:
        source: the OLMoE checkpoint as {"uri", "digest"}.
        converted: the Select-MoE checkpoint as {"uri", "digest"}.
        proof: verify.json.
        config: the stage's resolved configuration (JSON), as `check` gives it.
        code: digest of our code: a changed program is a changed task.
        work_root: folder or s3:// URI for committed progress.
    """
    from components import _shell

    inputs = {
        "original_model": _shell.checkpoint(source),
        "converted_model": _shell.checkpoint(converted),
    }
    _shell.run("verify", proof, config, code, work_root, inputs=inputs)
