"""Rows of any source to a normalised pool and a clean holdout.

A shell around `selectmoe ingest`: no behaviour of its own. Compiled by `python -m pipelines compile`.
"""

import os

from kfp import dsl

IMAGE = os.environ.get("SELECTMOE_IMAGE", "select-moe:0.1.0")


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def ingest(
    data: str,
    pool_digest: str,
    pool: dsl.Output[dsl.Dataset],
    config: str,
    code: str,
    work_root: str,
) -> None:
    """Rows of any source to a normalised pool and a clean holdout.

    Args:
        data: where the rows lie.
        pool_digest: digest of those rows as `check` saw them; other rows are an error.
        pool: pool/, holdout/ and the rejected rows.
        config: the stage's resolved configuration (JSON), as `check` gives it.
        code: digest of our code: a changed program is a changed task.
        work_root: folder or s3:// URI for committed progress.
    """
    from components import _shell

    _shell.run("ingest", pool, config, code, work_root, inputs={"data": data}, unchanged={data: pool_digest})
