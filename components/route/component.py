"""Stage 2, one shard: gate scores and expert distributions of the pool's rows.

A shell around `selectmoe route`: no behaviour of its own. Compiled by `python -m pipelines compile`.
"""

import os

from kfp import dsl

IMAGE = os.environ.get("SELECTMOE_IMAGE", "select-moe:0.1.0")


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def route(
    selector: str,
    router_weights: dsl.Input[dsl.Model],
    pool: dsl.Input[dsl.Dataset],
    shard: str,
    router_data: dsl.Output[dsl.Dataset],
    config: str,
    code: str,
    work_root: str,
    accelerator: str,
    accelerators: str,
    memory: str,
) -> None:
    """Stage 2, one shard: gate scores and expert distributions of the pool's rows.

    Args:
        selector: the Select-MoE checkpoint as {"uri", "digest"}.
        router_weights: what `warmup` wrote.
        pool: what `ingest` wrote.
        shard: INDEX/COUNT, the index from 0.
        router_data: router_data/ of this shard.
        config: the stage's resolved configuration (JSON), as `check` gives it.
        code: digest of our code: a changed program is a changed task.
        work_root: folder or s3:// URI for committed progress.
        accelerator: resource name of the accelerator that the task was given; empty: none.
        accelerators: how many; where there are some, torch must see one.
        memory: what the task was given; counts in the run's cost.
    """
    from components import _shell

    inputs = {"selector_model.path": _shell.checkpoint(selector), "data": pool.path}
    inputs |= {"model_checkpoint_path": router_weights.path}
    index, count = (int(n) for n in shard.split("/"))
    values = {"shard.index": index, "shard.count": count}
    hardware = _shell.Hardware(accelerator, int(accelerators), memory)
    _shell.run("route", router_data, config, code, work_root, inputs=inputs, values=values, hardware=hardware)
