"""An OLMoE checkpoint of the user's own, proved against its digest: the judge's source where nothing has to be built.

Compiled by `python -m pipelines compile`.
"""

import os
from typing import NamedTuple

from kfp import dsl

IMAGE = os.environ.get("SELECTMOE_IMAGE", "select-moe:0.1.0")


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def adopt(
    source: str,
    code: str,
    work_root: str,
) -> NamedTuple("Outputs", [("model", str)]):  # type: ignore[valid-type]  # the form from which KFP reads the outputs
    """An OLMoE checkpoint of the user's own, proved against its digest.

    Args:
        source: the checkpoint as {"uri", "digest"}.
        code: digest of our code: a changed program is a changed task; noted with the run.
        work_root: folder or s3:// URI for committed progress.

    Returns:
        model: the checkpoint as {"uri", "digest"}.
    """
    from components import _shell

    return _shell.adopt(source, code, work_root)
