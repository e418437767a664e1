"""The rows of every arm: those that Select-MoE picks (arm `selected`), what they have to beat, and the controls.

A shell around `selectmoe select` and `selectmoe baseline`: no behaviour of its own. Compiled by
`python -m pipelines compile`.
"""

import os

from kfp import dsl

IMAGE = os.environ.get("SELECTMOE_IMAGE", "select-moe:0.1.0")


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def select(
    router_data: dsl.Input[dsl.Dataset],
    pool: dsl.Input[dsl.Dataset],
    selections: dsl.Output[dsl.Dataset],
    config: str,
    baseline_config: str,
    code: str,
    work_root: str,
) -> None:
    """The rows of every arm: those that Select-MoE picks (arm `selected`), what they have to beat, and the controls.

    Args:
        router_data: what `merge` wrote.
        pool: what `ingest` wrote.
        selections: one folder per arm, or per arm and seed, each with its rows, why each of them, and its manifest.
        config: the resolved configuration (JSON) of the arm `selected`, as `check` gives it.
        baseline_config: the resolved configuration (JSON) of the other arms, as `check` gives it.
        code: digest of our code: a changed program is a changed task.
        work_root: folder or s3:// URI for committed progress.
    """
    from components import _shell

    rows = {"router_data": router_data.path, "pool": pool.path}
    _shell.run_selections(selections, config, baseline_config, code, work_root, **rows)
