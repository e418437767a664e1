"""Everything above to tables, plots, one self-contained HTML page and the verdict.

A shell around `selectmoe report`: no behaviour of its own. Compiled by `python -m pipelines compile`.
"""

import os

from kfp import dsl

IMAGE = os.environ.get("SELECTMOE_IMAGE", "select-moe:0.1.0")


@dsl.component(base_image=IMAGE, packages_to_install=[], install_kfp_package=False)
def report(
    converted: str,
    pool: dsl.Input[dsl.Dataset],
    proof: dsl.Input[dsl.Dataset],
    router_weights: dsl.Input[dsl.Model],
    router_data: dsl.Input[dsl.Dataset],
    selections: dsl.Input[dsl.Dataset],
    base: dsl.Input[dsl.Dataset],
    adapters: dsl.Input[list[dsl.Model]],
    evaluations: dsl.Input[list[dsl.Dataset]],
    result: dsl.Output[dsl.Dataset],
    page: dsl.Output[dsl.HTML],
    summary: dsl.Output[dsl.Markdown],
    numbers: dsl.Output[dsl.Metrics],
    config: str,
    code: str,
    plan: str,
    work_root: str,
) -> None:
    """Everything above to tables, plots, one self-contained HTML page and the verdict.

    Args:
        converted: the Select-MoE checkpoint as {"uri", "digest"}.
        pool: what `ingest` wrote.
        proof: what `verify` wrote.
        router_weights: what `warmup` wrote.
        router_data: what `merge` wrote.
        selections: what `select` wrote.
        base: what `evaluate` wrote for the model without an adapter.
        adapters: what `finetune` wrote, per arm and seed.
        evaluations: what `evaluate` wrote, per arm and seed.
        result: report.html, summary.md, results.json, verdict.json.
        page: report.html alone, for KFP's viewer.
        summary: summary.md alone, for KFP's viewer.
        numbers: effect, confidence interval and p per arm.
        config: the stage's resolved configuration (JSON), as `check` gives it.
        code: digest of our code: a changed program is a changed task.
        plan: digest of what is to be done; under it a later run finds this report.
        work_root: folder or s3:// URI for committed progress.
    """
    from components import _end, _shell

    single = [pool, proof, router_weights, router_data, selections, base]
    runs = [_shell.checkpoint(converted)] + [artifact.path for artifact in [*single, *adapters, *evaluations]]
    _shell.run("report", result, config, code, work_root, inputs={"runs": runs})
    _end.keep_result(result, plan, work_root, page, numbers)
    _end.show_summary(result, summary)
