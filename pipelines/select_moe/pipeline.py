"""The whole of Select-MoE as one KFP pipeline; `python -m pipelines compile` writes it to `pipeline.yaml` beside this file.

    check -> ingest -> upcycle | pretrain | adopt -> convert -> verify -> warmup -> route (shards) -> merge
          -> select (all arms) -> evaluate base, [ARM:SEED: finetune -> evaluate] -> report -> gate
    and, whatever became of it: finish

`check` is never cached. Whatever it proved comes back as parameters (digests, one configuration per stage), on which
every other task is cached: an unchanged second run executes `check` and `finish` and nothing else. The loops stand in
pipelines of their own because KFP's local runner (2.17) resolves a loop's items only among its pipeline's own
parameters, and puts the item in the place of every parameter that a loop takes from a task beside it.

A task that uses an accelerator takes what it was given as parameters of its component too: KFP (2.17) hands a
parameter that only a resource setting names into no loop and no condition.
"""

# No `from __future__ import annotations`: KFP reads the annotations as objects.

from kfp import dsl

from components._plan import STAGES
from components.adopt.component import adopt
from components.check.component import check
from components.convert.component import convert
from components.evaluate.component import evaluate
from components.finetune.component import finetune
from components.finish.component import finish
from components.gate.component import gate
from components.ingest.component import ingest
from components.merge.component import merge
from components.pretrain.component import pretrain
from components.report.component import report
from components.route.component import route
from components.select.component import select
from components.upcycle.component import upcycle
from components.verify.component import verify
from components.warmup.component import warmup
from pipelines.profile import DEVELOPMENT, Placed, Profile

COMPONENTS = (
    check,
    ingest,
    upcycle,
    pretrain,
    adopt,
    convert,
    verify,
    warmup,
    route,
    merge,
    select,
    finetune,
    evaluate,
    report,
    gate,
    finish,
)
"""Every component, in the order in which they run."""
FACTS = ("judge", "source", "target", "rows", "pool_digest", "code", "model_root", "mode", "plan")
HARDWARE = ("accelerator", "accelerators")
"""What `check` hands to the chain: a configuration per stage, these, the memory, and the items of the loops."""


class Graph(Placed):
    """The pipeline for one site; `pipeline` is what is compiled or run."""

    def __init__(self, profile: Profile = DEVELOPMENT) -> None:
        super().__init__(profile)
        whole = profile.with_defaults(self._select_moe)  # a wrong profile is said before the seconds of building
        self.routing = dsl.pipeline(name="routing", description="Router data of the whole pool, shard by shard.")(
            self._routing
        )
        self.comparison = dsl.pipeline(
            name="comparison", description="Every arm fine-tuned and evaluated with every seed; the report, the gate."
        )(self._comparison)
        self.chain = dsl.pipeline(name="chain", description="From the judge to the verdict.")(self._chain)
        self.pipeline = dsl.pipeline(
            name="select-moe",
            description="Select-MoE: from an OLMoE checkpoint and a pool of rows to a verdict.",
            pipeline_config=profile.pipeline_config(),
        )(whole)

    def _routing(
        self,
        selector: str,
        router_weights: dsl.Input[dsl.Model],
        pool: dsl.Input[dsl.Dataset],
        shards: list,  # type: ignore[type-arg]  # KFP knows only the bare name
        route_config: str,
        merge_config: str,
        code: str,
        work_root: str,
        accelerator: str,
        accelerators: str,
        memory: str,
    ) -> dsl.Dataset:
        """Route every shard, and put the shards together."""
        common = {"code": code, "work_root": work_root}
        hardware = {"accelerator": accelerator, "accelerators": accelerators, "memory": memory}
        with dsl.ParallelFor(shards, name="shards") as shard:
            given = {"selector": selector, "router_weights": router_weights, "pool": pool, "shard": shard}
            part = self.accelerate(route, config=route_config, **given, **common, **hardware)
        merged = self.place(merge(shards=dsl.Collected(part.outputs["router_data"]), config=merge_config, **common))
        router_data: dsl.Dataset = merged.outputs["router_data"]
        return router_data

    def _comparison(
        self,
        target: str,
        source: str,
        converted: str,
        pool: dsl.Input[dsl.Dataset],
        proof: dsl.Input[dsl.Dataset],
        router_weights: dsl.Input[dsl.Model],
        router_data: dsl.Input[dsl.Dataset],
        selections: dsl.Input[dsl.Dataset],
        arm_seeds: list,  # type: ignore[type-arg]
        finetune_config: str,
        evaluate_config: str,
        report_config: str,
        mode: str,
        plan: str,
        code: str,
        work_root: str,
        accelerator: str,
        accelerators: str,
        memory: str,
    ) -> None:
        """Fine-tune and evaluate every arm with every seed, evaluate the base model, report, and judge."""
        common = {"code": code, "work_root": work_root}
        hardware = {"accelerator": accelerator, "accelerators": accelerators, "memory": memory}
        models = {"target": target, "source": source, **common, **hardware}
        judged = {"pool": pool, "config": evaluate_config, **models}
        base = self.accelerate(evaluate, arm_seed="base:0", **judged)
        with dsl.ParallelFor(arm_seeds, name="arms") as arm_seed:
            rows = {"selections": selections, "arm_seed": arm_seed}
            adapters = self.accelerate(finetune, config=finetune_config, **rows, **models).outputs["adapters"]
            found = self.accelerate(evaluate, adapters=adapters, arm_seed=arm_seed, **judged)
        final = self.place(
            report(
                converted=converted,
                pool=pool,
                proof=proof,
                router_weights=router_weights,
                router_data=router_data,
                selections=selections,
                base=base.outputs["evaluation"],
                adapters=dsl.Collected(adapters),
                evaluations=dsl.Collected(found.outputs["evaluation"]),
                config=report_config,
                plan=plan,
                **common,
            )
        )
        self.place(gate(result=final.outputs["result"], mode=mode, **common))

    def _chain(
        self,
        work_root: str,
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
        model_root: str,
        mode: str,
        plan: str,
        accelerator: str,
        accelerators: str,
        memory: str,
        arm_seeds: list,  # type: ignore[type-arg]
        shards: list,  # type: ignore[type-arg]
    ) -> None:
        """Every stage from `ingest` to `gate`; the parameters are those that `check` returns."""
        common = {"code": code, "work_root": work_root}
        large = common | {"model_root": model_root}
        hardware = {"accelerator": accelerator, "accelerators": accelerators, "memory": memory}
        pool = self.place(ingest(data=rows, pool_digest=pool_digest, config=ingest_config, **common)).outputs["pool"]

        with dsl.If(judge == "upcycle", name="judge-upcycle"):
            dense = {"source": source, "pool": pool, "config": upcycle_config}
            sparse = self.accelerate(upcycle, **dense, **large, **hardware)
        with dsl.Elif(judge == "pretrain", name="judge-pretrain"):
            small = self.accelerate(pretrain, pool=pool, config=pretrain_config, **large, **hardware)
        with dsl.Else(name="judge-olmoe"):
            given = self.place(adopt(source=source, **common))
        olmoe = dsl.OneOf(sparse.outputs["model"], small.outputs["model"], given.outputs["model"])

        selector = self.place(convert(source=olmoe, config=convert_config, **large)).outputs["model"]
        proof = self.place(verify(source=olmoe, converted=selector, config=verify_config, **common))
        warmed = {"selector": selector, "pool": pool, "config": warmup_config}
        weights = self.accelerate(warmup, **warmed, **common, **hardware).after(proof).outputs["router_weights"]
        routed = {"selector": selector, "router_weights": weights, "pool": pool, "shards": shards}
        configs = {"route_config": route_config, "merge_config": merge_config}
        router_data = self.routing(**routed, **configs, **common, **hardware).output
        arms = {"config": select_config, "baseline_config": baseline_config}
        chosen = self.place(select(router_data=router_data, pool=pool, **arms, **common))
        self.comparison(
            target=target,
            source=olmoe,
            converted=selector,
            pool=pool,
            proof=proof.outputs["proof"],
            router_weights=weights,
            router_data=router_data,
            selections=chosen.outputs["selections"],
            arm_seeds=arm_seeds,
            finetune_config=finetune_config,
            evaluate_config=evaluate_config,
            report_config=report_config,
            mode=mode,
            plan=plan,
            **common,
            **hardware,
        )

    def _select_moe(
        self,
        preset: str = "quick",
        data: str = "",
        source_model: str = "",
        target_model: str = "",
        budget: str = "",
        arms: str = "",
        seeds: int = 0,
        tasks: str = "",
        shards: int = 1,
        accelerator_type: str = "nvidia.com/gpu",
        accelerator_count: int = 0,
        memory: str = "16Gi",
        gate: str = "",
        work_root: str = ".selectmoe/work",
        config: list = [],  # type: ignore[type-arg]  # noqa: B006  # KFP's form of a default
    ) -> None:
        """Check, then the chain; and whatever became of it, say so.

        Args:
            preset: size of everything; the other settings start from it.
            data: the user's own rows (file, folder or s3:// URI); empty: the preset's.
            source_model: what the judge is made from; empty: the preset's.
            target_model: the model to fine-tune; empty: the preset's.
            budget: how much is selected: 0.05 (share), 100 (rows) or 50000t (learned tokens); empty: the preset's.
            arms: what is compared, separated by commas: selected, random, METHOD or METHOD-SCORE; empty: the preset's.
            seeds: training seeds per arm, at least 3 for a verdict; 0: the preset's.
            tasks: lm-eval tasks beside the held-out rows, separated by commas; empty: the preset's.
            shards: tasks that share the routing; the result does not depend on it.
            accelerator_type: resource name of the accelerator, such as nvidia.com/gpu.
            accelerator_count: accelerators per task that uses one; 0: the CPU only, and none is asked for.
            memory: memory of a task that uses the accelerator, as a quantity.
            gate: off, warn or fail, unless the selection beats a random one; empty: the preset's.
            work_root: folder or s3:// URI for committed progress; the same one resumes what was interrupted.
            config: further `key=value` settings of `selectmoe run`; checked before anything runs.
        """
        last = self.place(finish(work_root=work_root)).set_caching_options(False)
        with dsl.ExitHandler(last, name="run"):
            checked = check(
                preset=preset,
                data=data,
                source_model=source_model,
                target_model=target_model,
                budget=budget,
                arms=arms,
                seeds=seeds,
                tasks=tasks,
                shards=shards,
                accelerator_type=accelerator_type,
                accelerator_count=accelerator_count,
                memory=memory,
                gate=gate,
                work_root=work_root,
                config=config,
            )
            out = self.place(checked).set_caching_options(False).outputs
            configs = {f"{stage}_config": out[stage] for stage in STAGES}
            rest = {name: out[name] for name in (*FACTS, *HARDWARE, "arm_seeds")}
            self.chain(work_root=work_root, memory=out["asked_memory"], shards=out["route_shards"], **configs, **rest)


select_moe = Graph().pipeline
"""The pipeline for development, as it is committed."""
