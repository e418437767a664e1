"""Many selections side by side: planted rows, scores, sources, overlap, and the verdicts where there are some.

A shell around `selectmoe compare`: no behaviour of its own. Compiled by `python -m pipelines compile`.
"""

import os

from kfp import dsl

IMAGE = os.environ.get("SELECTMOE_IMAGE", "select-moe:0.1.0")


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def compare(
    selections: dsl.Input[dsl.Dataset],
    pool: dsl.Input[dsl.Dataset],
    result: dsl.Output[dsl.Dataset],
    page: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Markdown],
    numbers: dsl.Output[dsl.Metrics],
    config: str,
    code: str,
    plan: str,
    work_root: str,
    evaluations: dsl.Input[list[dsl.Dataset]] = None,
) -> None:
    """Many selections side by side: planted rows, scores, sources, overlap, and the verdicts where there are some.

    Args:
        selections: what `select` wrote.
        pool: what `ingest` wrote: which rows were planted, if some were.
        result: compare.json, compare.html, summary.md, verdict.json.
        page: compare.html alone, for KFP's viewer.
        summary: summary.md alone, for KFP's viewer.
        numbers: effect, confidence interval and p per selection, where models were fine-tuned.
        config: the stage's resolved configuration (JSON), as `check` gives it.
        code: digest of our code: a changed program is a changed task.
        plan: digest of what is to be done; under it a later run finds this comparison.
        work_root: folder or s3:// URI for committed progress.
        evaluations: what `evaluate` wrote, per selection and seed; absent: nothing was fine-tuned.
    """
    from components import _end, _shell

    found = [artifact.path for artifact in evaluations or []]
    inputs = {"selections": selections.path, "planted": _shell.planted_rows(pool.path), "evaluations": found}
    _shell.run("compare", result, config, code, work_root, inputs=inputs)
    _end.keep_result(result, plan, work_root, page, numbers, name="compare.html")
    _end.show_summary(result, summary)
