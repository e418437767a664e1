"""Stage 2: the shards' router data as one unsharded run would have written it.

A shell around `selectmoe merge`: no behaviour of its own. Compiled by `python -m pipelines compile`.
"""

import os

from kfp import dsl

IMAGE = os.environ.get("SELECTMOE_IMAGE", "select-moe:0.1.0")


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def merge(
    shards: dsl.Input[list[dsl.Dataset]],
    router_data: dsl.Output[dsl.Dataset],
    config: str,
    code: str,
    work_root: str,
) -> None:
    """Stage 2: the shards' router data as one unsharded run would have written it.

    Args:
        shards: what `route` wrote, in any order.
        router_data: router_data/ of the whole pool.
        config: the stage's resolved configuration (JSON), as `check` gives it.
        code: digest of our code: a changed program is a changed task.
        work_root: folder or s3:// URI for committed progress.
    """
    from components import _shell

    _shell.run(
        "merge",
        router_data,
        config,
        code,
        work_root,
        inputs={"shards": [shard.path for shard in shards]},
    )
