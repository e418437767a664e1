"""The prerequisites of a whole run, proved before any work; and one resolved configuration per stage.

    selectmoe check preset=quick output_dir=out/check

Out: `check.json` (digests of data, models and code, the stages' configurations, an estimate of rows, tokens, FLOPs,
bytes and hours). `plan` gives the same to the chain in one process and to the KFP pipeline, so that both do the same.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selectmoe import demo, manifest, stage
from selectmoe.config import build, leaves, values
from selectmoe.demo import DemoConfig
from selectmoe.errors import UserError
from selectmoe.ingest import holdout_size
from selectmoe.picking import most_rows, target_rows
from selectmoe.run import CONFIGS, RunConfig, parse_budget
from selectmoe.select import SelectConfig
from selectmoe.selection import CLUSTERED
from selectmoe.storage import prove_store
from selectmoe.upcycle import DENSE

STAGE = "check"
VERSION = 1
MODELS = ("source_model", "target_model")
BYTES_PER_TOKEN = 4.0
"""UTF-8 bytes of English text per token of a BPE tokenizer, about; for the estimate only."""
DEVICES = {"cpu": 1e11, "a100": 1.5e14, "h100": 4e14}
"""FLOP/s that a stage reaches, about; for the estimate only."""


@dataclass(frozen=True)
class Plan:
    """What is to be done."""

    stages: dict[str, dict[str, Any]]
    digests: dict[str, str]
    arms: list[str]
    arm_seeds: list[str]
    judge: str
    shards: int
    estimate: dict[str, Any]


def resolve(config: RunConfig) -> DemoConfig | None:
    """Fill in what the user did not name: the places of the demo's rows and model.

    Nothing is planted into the user's own rows by a preset, and without planted rows there is no oracle.

    Returns:
        What the demo has to make before the run can read it; None where everything is the user's.

    Raises:
        UserError: nothing names the rows, or the model.
    """
    wanted = None
    if config.demo:
        wants_model = config.judge != "pretrain" and not config.source_model
        folder = Path(config.demo_dir, config.demo).resolve()
        own_rows = config.data not in ("", str(folder / "data"))
        if wants_model or not own_rows:
            wanted = DemoConfig(output_dir=str(folder), preset=config.demo, model=wants_model)
            wanted.validate()
        if own_rows:
            config.ingest.plant.share = 0.0
        config.data = config.data or str(folder / "data")
        if wants_model:
            config.source_model = str(folder / "model")
    if config.ingest.plant.share == 0 and "oracle" in config.arms:
        config.arms = [arm for arm in config.arms if arm != "oracle"]
    if not config.data:
        raise UserError("data= is missing: name a file of rows or a folder of datasets, or take preset=quick")
    if config.judge != "pretrain" and not config.source_model:
        raise UserError("source_model= is missing: name a checkpoint, or take preset=quick")
    if config.judge == "upcycle" and not config.target_model:
        config.target_model = config.source_model
    return wanted


def plan(config: RunConfig) -> Plan:
    """Prove the prerequisites and resolve the stages' configurations.

    Raises:
        UserError: anything that would stop the run later: one line, what, where, what would be right.
    """
    demo_config = resolve(config)
    stages = stage_configs(config)
    if config.work_root.startswith("s3://"):
        prove_store(config.work_root)
    if demo_config:
        _prove_before_demo(config, demo_config)
        demo.run(demo_config)
    rows, text = _read_rows(config)
    check_amount(config, stages["select"], rows)
    sizes = {name: _check_model(config, name) for name in MODELS if getattr(config, name)}
    digests = {name: manifest.identity_of(getattr(config, name)) for name in sizes}
    digests |= {"pool": manifest.tree_identity(config.data), "code": code_digest()}
    arm_seeds = [f"{arm}:{seed}" for arm in config.arms for seed in range(config.seeds)]
    estimate = _estimate(config, rows, text, sizes, len(arm_seeds))
    return Plan(stages, digests, list(config.arms), arm_seeds, config.judge, config.shards, estimate)


def _prove_before_demo(config: RunConfig, wanted: DemoConfig) -> None:
    """Prove what does not depend on the demo's rows and model, so that a mistake leaves none of them behind."""
    made = Path(wanted.output_dir)
    if Path(config.data) != made / "data":
        rows, _ = _read_rows(config)
    else:
        rows = wanted.rows or demo.PRESETS[wanted.preset][0]
    check_amount(config, stage_configs(config)["select"], rows)
    for name in MODELS:
        if (path := getattr(config, name)) and Path(path) != made / "model":
            _check_model(config, name)


def check_amount(config: RunConfig, select: dict[str, Any], rows: int) -> None:
    """Refuse a budget that the pool cannot give, or that picking's filter does not leave.

    Args:
        config: of the whole run.
        select: the resolved configuration of `select`.
        rows: how many come in, before the holdout.

    Raises:
        UserError: it cannot; the message names the largest that can.
    """
    held = holdout_size(config.ingest.holdout, rows)
    share = config.ingest.plant.share
    n = rows - held + round(share * (rows - held) / (1 - share))
    target = select["selection_rows"] or target_rows(n, select["selection_percentage"])
    settings = build(SelectConfig, select)
    drop = settings.parts()["drop"] if settings.method in CLUSTERED else 0.0
    if select["selection_tokens"] is None and target > most_rows(n, drop):
        filtered = f", of which picking leaves {most_rows(n, drop)} (filter.drop={drop:g})" if drop else ""
        raise UserError(
            f"budget={config.budget} is {target} rows, but the pool has {n} ({rows} read, {held} held out){filtered}: "
            "take a smaller budget or more rows"
        )


def stage_configs(config: RunConfig) -> dict[str, dict[str, Any]]:
    """One resolved configuration per stage: no paths, and what the chain decides for all of them.

    Raises:
        UserError: a stage's value is out of its range.
    """
    budget = parse_budget(config.budget)
    common = {"seed": config.seed, "threads": config.threads}
    extra: dict[str, dict[str, Any]] = {"select": budget, "baseline": dict(budget)}
    extra["baseline"] |= {
        "arms": [arm for arm in config.arms if arm != "selected"],
        "seeds": list(range(config.seeds)),
    }
    stages: dict[str, dict[str, Any]] = {}
    for name, cls in CONFIGS.items():
        own = values(getattr(config, name), "identity", "execution")
        stages[name] = own | common | extra.get(name, {})
        if own["threads"]:  # tasks that run side by side on one machine share its cores
            stages[name]["threads"] = own["threads"]
        for key in ("output_dir", "work_root"):
            stages[name].pop(key, None)
        if name == "route":
            stages[name].pop("shard")
        _validate(cls, stages[name], planted="oracle" in config.arms and name == "baseline")
    return stages


def _validate(cls: Any, resolved: dict[str, Any], planted: bool) -> None:
    """Check a stage's own rules before its inputs exist: required paths get a placeholder."""
    config = build(cls, resolved)
    for leaf in leaves(cls):
        if leaf.role != "input" or (leaf.default == "" and not (planted and leaf.name == "planted")):
            continue
        *parents, last = leaf.name.split(".")
        node = config
        for parent in parents:
            node = getattr(node, parent)
        if isinstance(leaf.default, list) or "list" in str(leaf.type):
            setattr(node, last, ["given-by-the-run"])
        elif not leaf.default or leaf.default == "???":
            setattr(node, last, "given-by-the-run")
    config.validate()


def _read_rows(config: RunConfig) -> tuple[int, int]:
    """Rows of the data and bytes of their text, read as `ingest` will.

    Raises:
        UserError: what `ingest` would raise.
    """
    from selectmoe import ingest

    reading = dataclasses.replace(config.ingest, data=config.data)
    intake = ingest.Intake()
    for name, path in ingest.find_datasets(reading).items():
        ingest.read_dataset(name, path, intake)
    ingest.check_rejected(intake, reading.max_rejected, config.data)
    if not intake.rows:
        raise UserError(f"data={config.data} holds no usable row")
    text = sum(len(m["content"].encode("utf-8", "surrogatepass")) for _, _, messages in intake.rows for m in messages)
    return len(intake.rows), text


def _check_model(config: RunConfig, name: str) -> int:
    """Number of parameters of a model; proves that it is there and of a kind that its role can use.

    Raises:
        UserError: it is not.
    """
    path = Path(getattr(config, name))
    if not (path / "config.json").is_file():
        raise UserError(f"{name}={path} holds no config.json: expected a transformers checkpoint folder")
    try:
        kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    except ValueError:
        raise UserError(f"{path / 'config.json'} is not JSON") from None
    if name == "source_model" and config.judge == "olmoe" and kind != "olmoe":
        raise UserError(
            f"{name}={path} is of model_type {kind!r}, not olmoe: give an OLMoE checkpoint, or judge=upcycle"
        )
    if name == "source_model" and config.judge == "upcycle" and kind not in DENSE:
        raise UserError(f"{name}={path} is of model_type {kind!r}: judge=upcycle takes {', '.join(DENSE)}")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{name}={path} holds no *.safetensors: save the model with save_pretrained")
    return sum(_parameters(file) for file in weights)


def _parameters(file: Path) -> int:
    """Number of parameters in a safetensors file, from its header."""
    with open(file, "rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            size = 1
            for n in entry["shape"]:
                size *= n
            total += size
    return total


def code_digest() -> str:
    """Digest of this package's own source: a changed program is a changed task for KFP's cache."""
    root = Path(__file__).parent
    return manifest.digest(
        [[p.relative_to(root).as_posix(), manifest.sha256_file(p)] for p in sorted(root.rglob("*.py"))]
    )


def _estimate(config: RunConfig, rows: int, text: int, sizes: dict[str, int], tunings: int) -> dict[str, Any]:
    """Rows, tokens, FLOPs (2 per parameter and token forward, 6 in training), bytes and hours by device."""
    tokens = text / BYTES_PER_TOKEN
    judge, target = sizes.get("source_model", 0), sizes.get("target_model", 0)
    budget = parse_budget(config.budget)
    share = budget.get("selection_percentage") or (
        budget["selection_rows"] / rows if "selection_rows" in budget else budget["selection_tokens"] / tokens
    )
    flops = 2.0 * judge * tokens + 6.0 * target * tokens * min(share, 1.0) * tunings
    hours = {name: flops / speed / 3600 for name, speed in DEVICES.items()}
    return {
        "rows": rows,
        "tokens": round(tokens),
        "flops": flops,
        "checkpoint_bytes": 4 * judge * 2,
        "fine_tunings": tunings,
        "hours": {name: round(value, 4) for name, value in hours.items()},
    }


def run(config: RunConfig, folder: Path | None = None) -> Path:
    """Write `check.json`.

    Args:
        config: of the whole run.
        folder: where to write; default: `config.output_dir`.

    Returns:
        The folder.

    Raises:
        UserError: as `plan`.
    """
    found = plan(config)
    place = dataclasses.replace(config, output_dir=str(folder or config.output_dir), work_root="")
    inputs = {"data": config.data, "source_model": config.source_model, "target_model": config.target_model}
    with stage.begin(STAGE, VERSION, place, inputs=inputs) as out:
        if out.done:
            return out.path
        text = json.dumps(dataclasses.asdict(found), indent=1, sort_keys=True)
        (out.staging / "check.json").write_text(text + "\n", encoding="utf-8")
        rows = found.estimate["rows"]
        out.commit(rows_in=rows, rows_out=rows, bookkeeping=["check.json"])
    return out.path
