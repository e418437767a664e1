"""Stage 1: the quality gates (and routers) of a Select-MoE model, trained on the pool.

A shell around `selectmoe warmup`: no behaviour of its own. Compiled by `python -m pipelines compile`.
"""

import os

from kfp import dsl

IMAGE = os.environ.get("SELECTMOE_IMAGE", "select-moe:0.1.0")


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def warmup(
    selector: str,
    pool: dsl.Input[dsl.Dataset],
    router_weights: dsl.Output[dsl.Model],
    config: str,
    code: str,
    work_root: str,
    accelerator: str,
    accelerators: str,
    memory: str,
) -> None:
    """Stage 1: the quality gates (and routers) of a Select-MoE model, trained on the pool.

    Args:
        selector: the Select-MoE checkpoint as {"uri", "digest"}.
        pool: what `ingest` wrote.
        router_weights: full_rank_weights.pt and .safetensors.
        config: the stage's resolved configuration (JSON), as `check` gives it.
        code: digest of our code: a changed program is a changed task.
        work_root: folder or s3:// URI for committed progress.
        accelerator: resource name of the accelerator that the task was given; empty: none.
        accelerators: how many; where there are some, torch must see one.
        memory: what the task was given; counts in the run's cost.
    """
    from components import _shell

    inputs = {"selector_model.path": _shell.checkpoint(selector), "data": pool.path}
    hardware = _shell.Hardware(accelerator, int(accelerators), memory)
    _shell.run("warmup", router_weights, config, code, work_root, inputs=inputs, hardware=hardware)
