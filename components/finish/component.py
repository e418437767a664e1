"""The exit handler: what the run did, why it failed, what it cost; what MLflow missed is sent; the webhook is told.

It runs whatever became of the run, and nothing of it can fail the run. Compiled by `python -m pipelines compile`.
"""

import os

from kfp import dsl

IMAGE = os.environ.get("SELECTMOE_IMAGE", "select-moe:0.1.0")


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def finish(
    status: dsl.PipelineTaskFinalStatus,
    summary: dsl.Output[dsl.Markdown],
    cost: dsl.Output[dsl.Metrics],
    work_root: str,
) -> None:
    """The exit handler: what the run did, why it failed, what it cost; what MLflow missed is sent; the webhook is told.

    Args:
        status: what became of the run, as KFP says.
        summary: stage and reason of a failure, the verdict, executions and seconds per stage.
        cost: seconds per stage and accelerator hours; what came from the cache costs nothing.
        work_root: folder or s3:// URI for committed progress, where every task noted what it did.
    """
    from components import _end

    _end.finish(status.state == "SUCCEEDED", work_root, summary, cost)
