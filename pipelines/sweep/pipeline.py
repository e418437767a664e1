"""Selection for many settings on one set of router data; `python -m pipelines compile` writes it to `pipeline.yaml`.

    prepare -> reuse router data, reuse pool -> select (all settings)
                -> compare -> gate                                            (seeds=0: nothing is fine-tuned)
                -> [ARM:SEED: finetune -> evaluate] -> compare -> gate
    and, whatever became of it: finish

A setting is an arm with settings, such as `kmeans-nll+drop-0.2` (`selectmoe.selection`); `selected` and `random` are
always among them. Caching and loops are as in `pipelines/select_moe/pipeline.py`.
"""

# No `from __future__ import annotations`: KFP reads the annotations as objects.

from kfp import dsl

from components.compare.component import compare
from components.evaluate.component import evaluate
from components.finetune.component import finetune
from components.finish.component import finish
from components.gate.component import gate
from components.prepare.component import prepare
from components.reuse.component import reuse
from components.select.component import select
from pipelines.profile import DEVELOPMENT, Placed, Profile

COMPONENTS = (prepare, reuse, select, finetune, evaluate, compare, gate, finish)
"""Every component, in the order in which they run."""
CONFIGURED = ("select", "baseline", "finetune", "evaluate", "compare")
FACTS = ("router_identity", "pool_identity", "target", "code", "mode", "plan", "tuned", "arm_seeds")
HARDWARE = ("accelerator", "accelerators")
"""What `prepare` hands on: a configuration per stage, these, and the memory."""


class Graph(Placed):
    """The pipeline for one site; `pipeline` is what is compiled or run."""

    def __init__(self, profile: Profile = DEVELOPMENT) -> None:
        super().__init__(profile)
        whole = profile.with_defaults(self._sweep)  # a wrong profile is said before the seconds of building
        self.tuning = dsl.pipeline(
            name="tuning", description="Every selection fine-tuned and evaluated with every seed, and compared."
        )(self._tuning)
        self.chain = dsl.pipeline(name="chain", description="From router data to the comparison.")(self._chain)
        self.pipeline = dsl.pipeline(
            name="select-moe-sweep",
            description="Select-MoE: selections by many settings from one set of router data, compared.",
            pipeline_config=profile.pipeline_config(),
        )(whole)

    def _tuning(
        self,
        target: str,
        pool: dsl.Input[dsl.Dataset],
        selections: dsl.Input[dsl.Dataset],
        arm_seeds: list,  # type: ignore[type-arg]  # KFP knows only the bare name
        finetune_config: str,
        evaluate_config: str,
        compare_config: str,
        mode: str,
        plan: str,
        code: str,
        work_root: str,
        accelerator: str,
        accelerators: str,
        memory: str,
    ) -> None:
        """Fine-tune and evaluate on every selection with every seed, compare, and judge."""
        common = {"code": code, "work_root": work_root}
        hardware = {"accelerator": accelerator, "accelerators": accelerators, "memory": memory}
        models = {"target": target, "source": "", **common, **hardware}
        with dsl.ParallelFor(arm_seeds, name="settings") as arm_seed:
            rows = {"selections": selections, "arm_seed": arm_seed}
            adapters = self.accelerate(finetune, config=finetune_config, **rows, **models).outputs["adapters"]
            judged = {"pool": pool, "adapters": adapters, "arm_seed": arm_seed, "config": evaluate_config}
            found = self.accelerate(evaluate, **judged, **models).outputs["evaluation"]
        both = {"selections": selections, "pool": pool, "plan": plan, **common}
        final = self.place(compare(evaluations=dsl.Collected(found), config=compare_config, **both))
        self.place(gate(result=final.outputs["result"], mode=mode, **common))

    def _chain(
        self,
        router_data: str,
        pool: str,
        work_root: str,
        select_config: str,
        baseline_config: str,
        finetune_config: str,
        evaluate_config: str,
        compare_config: str,
        router_identity: str,
        pool_identity: str,
        target: str,
        code: str,
        mode: str,
        plan: str,
        tuned: str,
        accelerator: str,
        accelerators: str,
        memory: str,
        arm_seeds: list,  # type: ignore[type-arg]
    ) -> None:
        """Fetch, select by every setting, compare with or without fine-tuning; parameters as `prepare` gives them."""
        common = {"code": code, "work_root": work_root}
        routed = self.place(reuse(uri=router_data, identity=router_identity, **common)).outputs["output"]
        rows = self.place(reuse(uri=pool, identity=pool_identity, **common)).outputs["output"]
        arms = {"config": select_config, "baseline_config": baseline_config}
        chosen = self.place(select(router_data=routed, pool=rows, **arms, **common)).outputs["selections"]
        both = {"selections": chosen, "pool": rows, "plan": plan, **common}
        with dsl.If(tuned == "yes", name="fine-tuned"):
            self.tuning(
                target=target,
                arm_seeds=arm_seeds,
                finetune_config=finetune_config,
                evaluate_config=evaluate_config,
                compare_config=compare_config,
                mode=mode,
                accelerator=accelerator,
                accelerators=accelerators,
                memory=memory,
                **both,
            )
        with dsl.Else(name="selected-only"):
            final = self.place(compare(config=compare_config, **both))
            self.place(gate(result=final.outputs["result"], mode=mode, **common))

    def _sweep(
        self,
        router_data: str,
        pool: str,
        settings: str,
        preset: str = "none",
        budget: str = "",
        target_model: str = "",
        seeds: int = 0,
        tasks: str = "",
        accelerator_type: str = "nvidia.com/gpu",
        accelerator_count: int = 0,
        memory: str = "16Gi",
        gate: str = "",
        work_root: str = ".selectmoe/work",
        config: list = [],  # type: ignore[type-arg]  # noqa: B006  # KFP's form of a default
    ) -> None:
        """Check, select by every setting, fine-tune where seeds are given, compare; and whatever became of it, say so.

        Args:
            router_data: finished output of `merge` or `route`, folder or s3:// URI.
            pool: finished output of `ingest` that was routed, folder or s3:// URI.
            settings: arms with their settings, separated by commas, such as kmeans+drop-0.2,kmeans+layers-0.1,top-nll.
            preset: size of everything; the other settings start from it.
            budget: how much is selected: 0.05 (share), 100 (rows) or 50000t (learned tokens); empty: the preset's.
            target_model: the model to fine-tune on every selection; not needed where seeds is 0.
            seeds: training seeds per selection, at least 3 for a verdict; 0: nothing is fine-tuned.
            tasks: lm-eval tasks beside the held-out rows, separated by commas; empty: the preset's.
            accelerator_type: resource name of the accelerator, such as nvidia.com/gpu.
            accelerator_count: accelerators per task that uses one; 0: the CPU only, and none is asked for.
            memory: memory of a task that uses the accelerator, as a quantity.
            gate: off, warn or fail, unless the selection beats a random one; empty: the preset's.
            work_root: folder or s3:// URI for committed progress; the same one resumes what was interrupted.
            config: further `key=value` settings of `selectmoe run`; checked before anything runs.
        """
        last = self.place(finish(work_root=work_root)).set_caching_options(False)
        with dsl.ExitHandler(last, name="run"):
            sizes = {"settings": settings, "budget": budget, "target_model": target_model, "seeds": seeds}
            asked = {"accelerator_type": accelerator_type, "accelerator_count": accelerator_count, "memory": memory}
            rest = {"preset": preset, "tasks": tasks, "gate": gate, "work_root": work_root, "config": config}
            checked = prepare(router_data=router_data, pool=pool, **sizes, **asked, **rest)
            out = self.place(checked).set_caching_options(False).outputs
            configs = {f"{stage}_config": out[stage] for stage in CONFIGURED}
            facts = {name: out[name] for name in (*FACTS, *HARDWARE)}
            self.chain(
                router_data=router_data,
                pool=pool,
                work_root=work_root,
                memory=out["asked_memory"],
                **configs,
                **facts,
            )
