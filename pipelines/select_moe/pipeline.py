"""The whole of Select-MoE as one KFP pipeline; `python -m pipelines compile` writes it to `pipeline.yaml` beside this file.

    check -> ingest -> pretrain | upcycle | adopt -> convert -> verify -> warmup -> route (shards) -> merge
          -> select -> baseline -> [ARM:SEED: finetune -> evaluate], evaluate base -> report

`check` is never cached. Whatever it proved comes back as parameters (digests, one configuration per stage), on which
every other task is cached: an unchanged second run executes `check` and nothing else. The loops stand in pipelines of
their own because KFP's local runner (2.17) resolves a loop's items only among its pipeline's own parameters, and puts
the item in the place of every parameter that a loop takes from a task beside it.
"""

# No `from __future__ import annotations`: KFP reads the annotations as objects.

from kfp import dsl

from components._shell import STAGES
from components.adopt.component import adopt
from components.baseline.component import baseline
from components.check.component import check
from components.convert.component import convert
from components.evaluate.component import evaluate
from components.finetune.component import finetune
from components.ingest.component import ingest
from components.merge.component import merge
from components.pretrain.component import pretrain
from components.report.component import report
from components.route.component import route
from components.select.component import select
from components.upcycle.component import upcycle
from components.verify.component import verify
from components.warmup.component import warmup

COMPONENTS = (
    check,
    ingest,
    pretrain,
    upcycle,
    adopt,
    convert,
    verify,
    warmup,
    route,
    merge,
    select,
    baseline,
    finetune,
    evaluate,
    report,
)
"""Every component, in the order in which they run."""
PARAMETERS = ("judge", "source", "target", "rows", "pool_digest", "code", "arm_seeds", "shards")
"""What `check` hands to the chain: a configuration per stage, and these."""


@dsl.pipeline(name="routing", description="Router data of the whole pool, shard by shard.")
def routing(
    selector: str,
    router_weights: dsl.Input[dsl.Model],
    pool: dsl.Input[dsl.Dataset],
    shards: list,  # type: ignore[type-arg]  # KFP knows only the bare name
    route_config: str,
    merge_config: str,
    code: str,
    work_root: str,
) -> dsl.Dataset:
    """Route every shard, and put the shards together."""
    common = {"code": code, "work_root": work_root}
    with dsl.ParallelFor(shards, name="shards") as shard:
        part = route(
            selector=selector, router_weights=router_weights, pool=pool, shard=shard, config=route_config, **common
        )
    merged = merge(shards=dsl.Collected(part.outputs["router_data"]), config=merge_config, **common)
    router_data: dsl.Dataset = merged.outputs["router_data"]
    return router_data


@dsl.pipeline(name="comparison", description="Every arm fine-tuned and evaluated with every seed; the report.")
def comparison(
    target: str,
    source: str,
    converted: str,
    pool: dsl.Input[dsl.Dataset],
    proof: dsl.Input[dsl.Dataset],
    router_weights: dsl.Input[dsl.Model],
    router_data: dsl.Input[dsl.Dataset],
    selection: dsl.Input[dsl.Dataset],
    baselines: dsl.Input[dsl.Dataset],
    arm_seeds: list,  # type: ignore[type-arg]
    finetune_config: str,
    evaluate_config: str,
    report_config: str,
    code: str,
    work_root: str,
) -> dsl.Dataset:
    """Fine-tune and evaluate every arm with every seed, evaluate the base model, and report."""
    common = {"code": code, "work_root": work_root}
    models = {"target": target, "source": source}
    base = evaluate(pool=pool, arm_seed="base:0", config=evaluate_config, **models, **common)
    with dsl.ParallelFor(arm_seeds, name="arms") as arm_seed:
        tuned = finetune(
            selection=selection, baselines=baselines, arm_seed=arm_seed, config=finetune_config, **models, **common
        )
        adapter = tuned.outputs["adapters"]
        judged = evaluate(pool=pool, adapters=adapter, arm_seed=arm_seed, config=evaluate_config, **models, **common)
    final = report(
        converted=converted,
        pool=pool,
        proof=proof,
        router_weights=router_weights,
        router_data=router_data,
        selection=selection,
        baselines=baselines,
        base=base.outputs["evaluation"],
        adapters=dsl.Collected(adapter),
        evaluations=dsl.Collected(judged.outputs["evaluation"]),
        config=report_config,
        **common,
    )
    result: dsl.Dataset = final.outputs["result"]
    return result


@dsl.pipeline(name="chain", description="From the judge to the verdict.")
def chain(
    work_root: str,
    model_root: str,
    ingest_config: str,
    upcycle_config: str,
    pretrain_config: str,
    convert_config: str,
    verify_config: str,
    warmup_config: str,
    route_config: str,
    merge_config: str,
    select_config: str,
    baseline_config: str,
    finetune_config: str,
    evaluate_config: str,
    report_config: str,
    judge: str,
    source: str,
    target: str,
    rows: str,
    pool_digest: str,
    code: str,
    arm_seeds: list,  # type: ignore[type-arg]  # KFP knows only the bare name
    shards: list,  # type: ignore[type-arg]
) -> dsl.Dataset:
    """Every stage from `ingest` to `report`; the parameters are those that `check` returns."""
    common = {"code": code, "work_root": work_root}
    large = common | {"model_root": model_root}
    ingested = ingest(data=rows, pool_digest=pool_digest, config=ingest_config, **common)
    pool = ingested.outputs["pool"]

    with dsl.If(judge == "upcycle", name="judge-upcycle"):
        sparse = upcycle(source=source, pool=pool, config=upcycle_config, **large)
    with dsl.Elif(judge == "pretrain", name="judge-pretrain"):
        small = pretrain(pool=pool, config=pretrain_config, **large)
    with dsl.Else(name="judge-olmoe"):
        given = adopt(source=source, code=code)
    olmoe = dsl.OneOf(sparse.outputs["model"], small.outputs["model"], given.outputs["model"])

    selector = convert(source=olmoe, config=convert_config, **large).outputs["model"]
    proof = verify(source=olmoe, converted=selector, config=verify_config, **common)
    weights = warmup(selector=selector, pool=pool, config=warmup_config, **common).after(proof)
    router_weights = weights.outputs["router_weights"]

    router_data = routing(
        selector=selector,
        router_weights=router_weights,
        pool=pool,
        shards=shards,
        route_config=route_config,
        merge_config=merge_config,
        **common,
    ).output

    chosen = select(router_data=router_data, pool=pool, config=select_config, **common)
    selection = chosen.outputs["selection"]
    others = baseline(router_data=router_data, pool=pool, config=baseline_config, **common)
    baselines = others.outputs["baselines"]

    result: dsl.Dataset = comparison(
        target=target,
        source=olmoe,
        converted=selector,
        pool=pool,
        proof=proof.outputs["proof"],
        router_weights=router_weights,
        router_data=router_data,
        selection=selection,
        baselines=baselines,
        arm_seeds=arm_seeds,
        finetune_config=finetune_config,
        evaluate_config=evaluate_config,
        report_config=report_config,
        **common,
    ).output
    return result


@dsl.pipeline(
    name="select-moe",
    description="Select-MoE: from an OLMoE checkpoint and a pool of rows to a verdict.",
)
def select_moe(
    preset: str = "quick",
    data: str = "",
    budget: str = "",
    work_root: str = ".selectmoe/work",
    model_root: str = ".selectmoe/models",
    overrides: list = [],  # type: ignore[type-arg]  # noqa: B006  # KFP's form of a default
) -> dsl.Dataset:
    """Check, then the chain.

    Args:
        preset: size of everything; the other settings start from it.
        data: the user's own rows; empty: the preset's.
        budget: how much is selected: 0.05 (share), 100 (rows) or 50000t (learned tokens); empty: the preset's.
        work_root: folder or s3:// URI for committed progress; the same one resumes what was interrupted.
        model_root: folder for large checkpoints.
        overrides: further `key=value` settings of `selectmoe run`.
    """
    checked = check(
        preset=preset,
        data=data,
        budget=budget,
        work_root=work_root,
        model_root=model_root,
        overrides=overrides,
    )
    checked.set_caching_options(False)
    configs = {f"{stage}_config": checked.outputs[stage] for stage in STAGES}
    rest = {name: checked.outputs[name] for name in PARAMETERS}
    result: dsl.Dataset = chain(work_root=work_root, model_root=model_root, **configs, **rest).output
    return result
