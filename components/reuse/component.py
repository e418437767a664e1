"""A finished output of another run, proved against its identity: what a sweep starts from.

Compiled by `python -m pipelines compile`.
"""

import os

from kfp import dsl

IMAGE = os.environ.get("SELECTMOE_IMAGE", "select-moe:0.1.0")


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def reuse(
    uri: str,
    identity: str,
    output: dsl.Output[dsl.Dataset],
    code: str,
    work_root: str,
) -> None:
    """A finished output of another run, proved against its identity: what a sweep starts from.

    Args:
        uri: folder or s3:// URI of the output.
        identity: its identity as `check` saw it; anything else is an error.
        output: the same files.
        code: digest of our code: a changed program is a changed task; noted with the run.
        work_root: folder or s3:// URI for committed progress.
    """
    from components import _shell

    _shell.reuse(uri, identity, output, code, work_root)
