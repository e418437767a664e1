"""The configuration of a whole run to proved prerequisites, digests, and one resolved configuration per stage.

A shell around `selectmoe check`, never cached: what it returns *as parameters* is what every later task is cached on.
Compiled by `python -m pipelines compile`.
"""

import os
from typing import NamedTuple

from kfp import dsl

IMAGE = os.environ.get("SELECTMOE_IMAGE", "select-moe:0.1.0")


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def check(
    checked: dsl.Output[dsl.Dataset],
    preset: str,
    data: str,
    budget: str,
    work_root: str,
    model_root: str,
    overrides: list,  # type: ignore[type-arg]  # KFP knows only the bare name
) -> NamedTuple(  # type: ignore[valid-type]  # the form from which KFP reads the outputs
    "Checked",
    [
        ("ingest", str),
        ("upcycle", str),
        ("pretrain", str),
        ("convert", str),
        ("verify", str),
        ("warmup", str),
        ("route", str),
        ("merge", str),
        ("select", str),
        ("baseline", str),
        ("finetune", str),
        ("evaluate", str),
        ("report", str),
        ("judge", str),
        ("source", str),
        ("target", str),
        ("rows", str),
        ("pool_digest", str),
        ("code", str),
        ("arm_seeds", list),
        ("shards", list),
    ],
):
    """The configuration of a whole run to proved prerequisites, digests, and one resolved configuration per stage.

    Args:
        checked: check.json.
        preset: size of everything; the other settings start from it.
        data: the user's own rows; empty: the preset's.
        budget: how much is selected: 0.05 (share), 100 (rows) or 50000t (learned tokens); empty: the preset's.
        work_root: folder or s3:// URI for committed progress.
        model_root: folder for large checkpoints.
        overrides: further `key=value` settings of `selectmoe run`.

    Returns:
        One resolved configuration per stage (JSON); judge: upcycle, pretrain or olmoe; source, target: checkpoints as
        {"uri", "digest"}; rows: where the pool's rows lie; digests of these and of our code; the loop items ARM:SEED and INDEX/COUNT.
    """
    from components import _shell

    named = {
        "preset": preset,
        "data": data,
        "budget": budget,
        "work_root": work_root,
        "model_root": model_root,
    }
    return _shell.check(checked, named, overrides)
