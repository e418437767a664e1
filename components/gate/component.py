"""The answer as an exit status: with `fail`, a selection that does not beat a random one ends the run.

A step of its own after `report`, so that the report is there whatever the answer is. Compiled by
`python -m pipelines compile`.
"""

import os

from kfp import dsl

IMAGE = os.environ.get("SELECTMOE_IMAGE", "select-moe:0.1.0")


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def gate(
    result: dsl.Input[dsl.Dataset],
    mode: str,
    code: str,
    work_root: str,
) -> None:
    """The answer as an exit status: with `fail`, a selection that does not beat a random one ends the run.

    Args:
        result: what `report` wrote.
        mode: off: nothing, warn: say so, fail: end with exit status 3; unless the verdict is beats_random.
        code: digest of our code: a changed program is a changed task; noted with the run.
        work_root: folder or s3:// URI for committed progress.
    """
    from components import _end

    _end.gate(result.path, mode, code, work_root)
