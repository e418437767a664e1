"""The rows of every other arm: what the selection has to beat, and the controls.

A shell around `selectmoe baseline`: no behaviour of its own. Compiled by `python -m pipelines compile`.
"""

import os

from kfp import dsl

IMAGE = os.environ.get("SELECTMOE_IMAGE", "select-moe:0.1.0")


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def baseline(
    router_data: dsl.Input[dsl.Dataset],
    pool: dsl.Input[dsl.Dataset],
    baselines: dsl.Output[dsl.Dataset],
    config: str,
    code: str,
    work_root: str,
) -> None:
    """The rows of every other arm: what the selection has to beat, and the controls.

    Args:
        router_data: what `merge` wrote.
        pool: what `ingest` wrote.
        baselines: one folder per arm, or per arm and seed.
        config: the stage's resolved configuration (JSON), as `check` gives it.
        code: digest of our code: a changed program is a changed task.
        work_root: folder or s3:// URI for committed progress.
    """
    from components import _shell

    inputs = {
        "router_data_dir": router_data.path,
        "data": pool.path,
        "planted": _shell.planted(config, pool.path),
    }
    _shell.run("baseline", baselines, config, code, work_root, inputs=inputs)
