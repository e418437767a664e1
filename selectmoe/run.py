"""The whole chain, from rows and a model to the verdict, in one process: no KFP, no MLflow, no S3.

    selectmoe run preset=quick output_dir=outputs/quick
    selectmoe run preset=quick data=path/to/rows.jsonl output_dir=outputs/mine

One configuration resolves into one configuration per stage (`selectmoe.check.plan`), which the KFP pipeline uses as it
stands: hence the same identities. Out: one folder per stage. A second call finds what is finished and goes on.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selectmoe import cache, manifest
from selectmoe.baseline import BaselineConfig
from selectmoe.config import StageConfig, execution, group, identity, input_, leaves, load
from selectmoe.convert import ConvertConfig
from selectmoe.entry import at_stage
from selectmoe.errors import UserError
from selectmoe.evaluate import EvaluateConfig
from selectmoe.finetune import FinetuneConfig
from selectmoe.ingest import IngestConfig
from selectmoe.merge import MergeConfig
from selectmoe.pretrain import PretrainConfig
from selectmoe.report import ReportConfig
from selectmoe.resources import AcceleratorConfig
from selectmoe.route import RouteConfig
from selectmoe.select import SelectConfig
from selectmoe.selection import parse_arm
from selectmoe.sources import DatasetConfig
from selectmoe.upcycle import UpcycleConfig
from selectmoe.verify import VerifyConfig
from selectmoe.warmup import WarmupConfig

if TYPE_CHECKING:
    from selectmoe.check import Plan

JUDGES = ("upcycle", "pretrain", "olmoe")
CONFIGS: dict[str, type[StageConfig]] = {
    "ingest": IngestConfig,
    "upcycle": UpcycleConfig,
    "pretrain": PretrainConfig,
    "convert": ConvertConfig,
    "verify": VerifyConfig,
    "warmup": WarmupConfig,
    "route": RouteConfig,
    "merge": MergeConfig,
    "select": SelectConfig,
    "baseline": BaselineConfig,
    "finetune": FinetuneConfig,
    "evaluate": EvaluateConfig,
    "report": ReportConfig,
}
"""The stages of the chain in their order, with their configurations; each is a group of `RunConfig` of the same name."""

DATASETS = tuple(f"dataset.{leaf.name}" for leaf in leaves(DatasetConfig) if leaf.role != "input")
"""Keys of the rows that a stage reads without `data=`; in the chain it has that."""
MANAGED = {
    "": ("output_dir", "work_root", "seed"),
    "convert": ("apply.gain", "apply.bias"),
    "verify": ("dtype",),
    "route": ("shard.index", "shard.count", *DATASETS),
    "select": ("selection_percentage", "selection_rows", "selection_tokens"),
    "baseline": ("arms", "seeds", "selection_percentage", "selection_rows", "selection_tokens"),
    "warmup": ("training.distributed", *DATASETS),
    "finetune": ("arm", "training.distributed"),
    "evaluate": ("arm",),
}
"""Keys of the stages that the chain sets itself: from its own keys, or task by task."""
FREE_INPUTS = ("evaluate.include_path", "ingest.decontaminate.include_path")
"""Inputs of stages that the chain does not make, hence the user's to name."""


@dataclass
class MlflowConfig:
    """Whether a run depends on MLflow."""

    required: bool | None = execution(
        None, doc="whether MLflow must work when the run begins; default: where MLFLOW_TRACKING_URI is set"
    )


@dataclass
class RunConfig(StageConfig):
    """Configuration of a whole run; the groups are the stages' own configurations."""

    data: str = input_("", doc="your rows (file or folder of datasets); default: the preset's, from packages")
    source_model: str = input_("", doc="what the judge is made from; default: the demo's SmolLM2-135M")
    target_model: str = input_("", doc="the model to fine-tune; default: source_model (of judge=pretrain: the judge's)")
    judge: str = identity("olmoe", doc="how source_model becomes a judge: olmoe (it is one), upcycle, pretrain (none)")
    budget: str = identity("0.05", doc="how much is selected: 0.05 (share), 100 (rows) or 50000t (answer tokens)")
    arms: list[str] = identity(["selected", "random"], doc="what is compared; METHOD or METHOD-SCORE, selected, oracle")
    seeds: int = identity(5, doc="training seeds per arm, at least 3 for a verdict")
    shards: int = execution(1, doc="processes that share the routing; the result does not depend on it")
    demo: str = execution("", doc="rows and model from installed packages, of this size: quick, full or tiny")
    demo_dir: str = execution(".selectmoe/demo", doc="where the demo's rows and model lie")
    model_root: str = execution(
        "", doc="folder for large checkpoints, or s3:// to keep them there too; default: OUTPUT_DIR"
    )
    dry_run: bool = execution(False, doc="prove what can be proved, print what it will cost, and do nothing")
    accelerator: AcceleratorConfig = group(AcceleratorConfig)
    mlflow: MlflowConfig = group(MlflowConfig)
    ingest: IngestConfig = group(IngestConfig)
    upcycle: UpcycleConfig = group(UpcycleConfig)
    pretrain: PretrainConfig = group(PretrainConfig)
    convert: ConvertConfig = group(ConvertConfig)
    verify: VerifyConfig = group(VerifyConfig)
    warmup: WarmupConfig = group(WarmupConfig)
    route: RouteConfig = group(RouteConfig)
    merge: MergeConfig = group(MergeConfig)
    select: SelectConfig = group(SelectConfig)
    baseline: BaselineConfig = group(BaselineConfig)
    finetune: FinetuneConfig = group(FinetuneConfig)
    evaluate: EvaluateConfig = group(EvaluateConfig)
    report: ReportConfig = group(ReportConfig)

    def validate(self) -> None:
        """Check what concerns the whole chain; the stages' own checks follow in `check.plan`.

        Raises:
            UserError: a value is out of its range, or a key is set that the chain sets itself.
        """
        if self.judge not in JUDGES:
            raise UserError(f"judge={self.judge!r} is unknown; known: {', '.join(JUDGES)}")
        if "selected" not in self.arms or "random" not in self.arms:
            raise UserError("arms= must hold selected and random: the verdict compares them")
        if len(set(self.arms)) < len(self.arms):
            raise UserError(f"arms={self.arms} names an arm twice")
        self.accelerator.validate()
        for arm in self.arms:
            self._check_score(f"arm {arm}", parse_arm(arm).score)
        self._check_score("select.score", self.select.score)
        if self.seeds < 3:
            raise UserError(f"seeds={self.seeds}: a verdict needs at least 3")
        if self.shards < 1:
            raise UserError(f"shards={self.shards}: at least 1")
        parse_budget(self.budget)
        for name, cls in CONFIGS.items():
            self._check_managed(name, cls)

    def _check_score(self, what: str, score: str) -> None:
        """Raise `UserError` where routing would not compute what a score is made of."""
        for part in {"nll": ("nll",), "ifd": ("nll", "ifd"), "combined": ("nll", "ifd")}.get(score, ()):
            if not getattr(self.route, part):
                raise UserError(f"{what} ranks by {score}: it needs route.{part}=true, or leave it out")

    def _check_managed(self, name: str, cls: type[StageConfig]) -> None:
        own = (*MANAGED[""], *MANAGED.get(name, ()))
        for leaf in leaves(cls):
            value: Any = getattr(self, name)
            for part in leaf.name.split("."):
                value = getattr(value, part)
            taken = leaf.name in own or (leaf.role == "input" and f"{name}.{leaf.name}" not in FREE_INPUTS)
            if taken and value != leaf.default:
                raise UserError(
                    f"{name}.{leaf.name} is set by the run itself: use the run's own keys (selectmoe run --help)"
                )


def parse_budget(budget: str) -> dict[str, Any]:
    """The keys of `select` that a budget means.

    Raises:
        UserError: it is none of a share in (0, 1], a number of rows, a number of tokens with a `t`.
    """
    wrong = UserError(
        f"budget={budget} must be a share above 0 and at most 1 (0.05), rows (100) or answer tokens (50000t)"
    )
    text = str(budget)
    try:
        if text.endswith("t"):
            key, value = "selection_tokens", float(int(text[:-1]))
        elif "." in text or "e" in text:
            key, value = "selection_percentage", float(text)
        else:
            key, value = "selection_rows", float(int(text))
    except ValueError:
        raise wrong from None
    if not 0 < value < float("inf") or (key == "selection_percentage" and value > 1):
        raise wrong
    return {key: value if key == "selection_percentage" else int(value)}


def compose(overrides: list[str]) -> RunConfig:
    """The configuration of a run from `key=value` strings, as the command line gives them."""
    from selectmoe.cli import compose as compose_stage

    config: RunConfig = compose_stage("run", overrides)
    return config


def plan(config: RunConfig) -> Plan:
    """Prove the place and all prerequisites; makes the demo where one is asked for.

    Raises:
        UserError: something is wrong with the input.
    """
    from selectmoe import check

    check_place(Path(config.output_dir))
    return check.plan(config)


def run(config: RunConfig, planned: Plan | None = None) -> Path:
    """Run every stage in its order; with `dry_run` only prove and estimate, and write nothing.

    Args:
        config: of the whole run.
        planned: its plan; default: it is made.

    Returns:
        The folder of the report; with `dry_run` the output_dir.

    Raises:
        UserError: something is wrong with the input; said by `check`, before any work.
        Refused: `verify` found a difference, or `report.gate=fail` and the verdict is not *beats random*.
    """
    from selectmoe import check

    root = Path(config.output_dir)
    if config.dry_run:
        check_place(root)
        check.preview(config)
        return root
    planned = planned or plan(config)
    check.run(replace(config, output_dir=str(root / "check")), planned)
    chain = Chain(config, planned, root)
    ingested = chain.do("ingest", data=config.data)
    source = config.source_model
    if config.judge == "upcycle":
        source = chain.do("upcycle", source_model=source, data=ingested)
    elif config.judge == "pretrain":
        source = chain.do("pretrain", data=ingested)
    target = config.target_model or source
    judge = chain.do("convert", source_model=source)
    proof = chain.do("verify", original_model=source, converted_model=judge)
    weights = chain.do("warmup", **{"selector_model.path": judge, "data": ingested})
    routed = {"selector_model.path": judge, "model_checkpoint_path": weights, "data": ingested}
    shards = [
        chain.do("route", f"route-{i}", **routed, **{"shard.index": i, "shard.count": config.shards})
        for i in range(config.shards)
    ]
    router_data = chain.do("merge", shards=shards)
    rows = {"router_data_dir": router_data, "data": ingested}
    selection = chain.do("select", **rows)
    planted = {"planted": ingested} if "oracle" in config.arms else {}
    baselines = chain.do("baseline", **rows, **planted)
    evaluations = chain.tune(selection, baselines, ingested, target)
    found = [judge, ingested, proof, weights, router_data, selection, baselines, *evaluations]
    return Path(chain.do("report", runs=found))


def check_place(root: Path) -> None:
    """Refuse a folder that holds anything but a run.

    Raises:
        UserError: it is a file, an output itself, or holds something that no run writes.
    """
    if root.exists() and not root.is_dir():
        raise UserError(f"output_dir={root} is a file: choose another output_dir")
    if (root / manifest.NAME).is_file():
        found = manifest.read_manifest(root, verify=False).stage
        raise UserError(f"output_dir={root} holds the output of {found}: choose another output_dir")
    for path in sorted(root.iterdir()) if root.is_dir() else []:
        if path.name.split("-")[0] not in ("check", *CONFIGS, *manifest.RESERVED):
            raise UserError(
                f"output_dir={root} holds {path.name}, which is not part of a run: choose another output_dir"
            )


class Chain:
    """One run: its plan, and where its stages write."""

    def __init__(self, config: RunConfig, plan: Plan, root: Path) -> None:
        self.config = config
        self.plan = plan
        self.root = root

    def do(self, name: str, folder: str = "", **given: Any) -> str:
        """Run one stage with the plan's configuration and these paths; returns its output folder."""
        models = self.config.model_root if name in ("upcycle", "pretrain", "convert") else ""
        remote = models.startswith("s3://")
        output = Path(self.root if remote else models or self.root) / (folder or name)
        paths = given | {"output_dir": str(output), "work_root": self.config.work_root}
        print(f"[{folder or name}]", flush=True)
        settings = load(CONFIGS[name], self.plan.stages[name], **paths)
        with at_stage(folder or name):
            made = importlib.import_module(f"selectmoe.{name}").run(settings)
            if remote:
                cache.store(made, f"{models.rstrip('/')}/{name}")
        return str(made)

    def tune(self, selection: str, baselines: str, holdout: str, target: str) -> list[str]:
        """Fine-tune and evaluate every arm with every seed, and evaluate the base model; the folders of all of it."""
        from selectmoe.selection import arm_directory

        common = {"model": target, "holdout": holdout}
        found = [self.do("evaluate", "evaluate/base-0", arm="base", seed=0, **common)]
        for item in self.plan.arm_seeds:
            arm, seed = item.rsplit(":", 1)
            rows = arm_directory(selection if arm == "selected" else baselines, arm, int(seed))
            paths = {"training.model": target, "dataset.data_path": str(rows), "reference": selection}
            task = {"arm": arm, "seed": int(seed)}
            adapter = self.do("finetune", f"finetune/{arm}-{seed}", **paths, **task)
            found += [adapter, self.do("evaluate", f"evaluate/{arm}-{seed}", adapters=[adapter], **common, **task)]
        return found
