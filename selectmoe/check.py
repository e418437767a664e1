"""The prerequisites of a whole run, proved before any work; and one resolved configuration per stage.

    selectmoe check preset=quick output_dir=out/check
    selectmoe check data=rows.jsonl source_model=OLMOE target_model=MODEL work_root=s3://bucket/work output_dir=out/check

Out: `check.json` (digests of data, models and code, the stages' configurations, an estimate of rows, tokens, FLOPs,
bytes and hours); the estimate is printed as well. `plan` gives the same to the chain in one process and to the KFP
pipeline, so that both do the same. The proofs themselves are in `selectmoe.prerequisites`; S3 and MLflow are asked in the
background while data and models are read, so that all of it ends within 30 s, and several mistakes are said together.
Only then are the demo's rows and model made, large files read for their digests, and what lies elsewhere brought here.

With `dry_run=true`, `selectmoe check` and `selectmoe run` prove the same, print the estimate, and write nothing.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from selectmoe import checkpoint, demo, manifest, prerequisites, stage
from selectmoe.config import build, leaves, values
from selectmoe.demo import DemoConfig
from selectmoe.errors import UserError
from selectmoe.estimate import Model, Pool, describe, estimate
from selectmoe.glimpse import Glimpse, look
from selectmoe.run import CONFIGS, RunConfig, parse_budget
from selectmoe.sources import data_identity
from selectmoe.storage import prove_store
from selectmoe.upcycle import DENSE, olmoe_config
from selectmoe.warmup import RECIPES

STAGE = "check"
VERSION = 1
MODELS = ("source_model", "target_model")
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Without one of these there is no tokenizer, whatever transformers makes of the rest."""


@dataclass(frozen=True)
class Plan:
    """What is to be done."""

    stages: dict[str, dict[str, Any]]
    digests: dict[str, str]
    uris: dict[str, str]
    """Where another machine finds the models: a path, s3:// or hf://."""
    arms: list[str]
    arm_seeds: list[str]
    judge: str
    shards: int
    estimate: dict[str, Any]


@dataclass(frozen=True)
class Proved:
    """What the proofs found: sizes of the rows, how many of them are selected, and the models by their key."""

    pool: Pool | None
    selected: int
    models: dict[str, tuple[Model, Glimpse]]


def resolve(config: RunConfig) -> DemoConfig | None:
    """Fill in what the user did not name: the places of the demo's rows and model.

    Nothing is planted into the user's own rows by a preset, and without planted rows the preset has no oracle.

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
            config.arms = [arm for arm in config.arms if arm != "oracle"]
        config.data = config.data or str(folder / "data")
        if wants_model:
            config.source_model = str(folder / "model")
    if config.ingest.plant.share == 0 and "oracle" in config.arms:
        raise UserError("arm oracle leaves out planted rows: give ingest.plant.share, or leave it out of arms=")
    if not config.data:
        raise UserError("data= is missing: name a file of rows or a folder of datasets, or take preset=quick")
    if config.judge != "pretrain" and not config.source_model:
        raise UserError("source_model= is missing: name a checkpoint, or take preset=quick")
    if config.judge == "upcycle" and not config.target_model:
        config.target_model = config.source_model
    return wanted


def plan(config: RunConfig, proved: Callable[[], None] = lambda: None) -> Plan:
    """Prove the prerequisites and resolve the stages' configurations.

    Args:
        config: of the whole run.
        proved: called when no mistake of the user's is left to be found, before the demo is made and digests are computed.

    Raises:
        UserError: anything that would stop the run later: one line, what, where, what would be right.
        Unavailable: a server failed that the run cannot do without.
    """
    wanted, stages = resolve(config), stage_configs(config)
    servers = _servers(config)
    if wanted and (lacking := _lacking(wanted)):
        prove(config, servers, lacking)  # so that a mistake leaves nothing of the demo behind
        proved()
        demo.run(wanted)
        found = prove(config, [])
    else:
        found = prove(config, servers)
        proved()
    costs = _estimate(config, found)
    references = {name: glimpse.reference() for name, (_, glimpse) in found.models.items()}
    digests = {name: reference.digest for name, reference in references.items()}
    digests |= {"pool": data_identity(config.data), "code": code_digest()}
    if folder := config.evaluate.include_path:
        digest = manifest.tree_identity(folder)
        stages["evaluate"] |= {"include_path": str(Path(folder).resolve()), "include_digest": digest}
    if folder := config.ingest.decontaminate.include_path:
        digest = manifest.tree_identity(folder)
        stages["ingest"]["decontaminate"] |= {"include_path": str(Path(folder).resolve()), "include_digest": digest}
    arm_seeds = [f"{arm}:{seed}" for arm in config.arms for seed in range(config.seeds)]
    uris = {name: reference.uri for name, reference in references.items()}
    return Plan(stages, digests, uris, list(config.arms), arm_seeds, config.judge, config.shards, costs)


def preview(config: RunConfig) -> None:
    """What `dry_run=true` does: prove all that can be proved, print the estimate, and write nothing.

    Raises:
        UserError, Unavailable: as `plan`.
    """
    wanted = resolve(config)
    stage_configs(config)
    lacking = _lacking(wanted) if wanted else []
    found = prove(config, _servers(config), lacking)
    if lacking:
        print(f"check: nothing is wrong; no estimate, since the demo makes {' and '.join(lacking)} only when it is run")
    else:
        print(f"check: all prerequisites are there\n{describe(_estimate(config, found))}")


def prove(config: RunConfig, servers: Collection[Callable[[], None]], lacking: Collection[str] = ()) -> Proved:
    """Prove rows, models, tasks and places, and what `servers` prove, side by side.

    Args:
        config: of the whole run, resolved.
        servers: proofs that mostly wait.
        lacking: places that the demo has yet to make, of which nothing can be read.

    Returns:
        What was found; no pool where the demo has yet to make it.

    Raises:
        UserError: all mistakes in one line.
        Unavailable: nothing is wrong but a server that does not answer.
    """
    proofs = prerequisites.Proofs()
    pool, selected = None, 0
    with ThreadPoolExecutor() as background, tempfile.TemporaryDirectory() as scratch:
        asked = [background.submit(proofs.attempt, proof) for proof in servers]
        proofs.attempt(prerequisites.check_places, config)
        if config.data in lacking:
            rows = demo.PRESETS[config.demo][0]
            proofs.attempt(prerequisites.check_rows, config, rows)
        elif pool := proofs.attempt(prerequisites.read_pool, config):
            selected = proofs.attempt(prerequisites.check_rows, config, pool.rows, pool.answers, pool.held) or 0
        proofs.attempt(prerequisites.check_tasks, config)
        models = _check_models(config, proofs, lacking, Path(scratch))
        for answer in asked:
            answer.result()
    proofs.settle()
    return Proved(pool, selected, models)


def _lacking(wanted: DemoConfig) -> list[str]:
    """What the demo is to make and has not made yet."""
    places = [Path(wanted.output_dir, "data"), *([Path(wanted.output_dir, "model")] if wanted.model else [])]
    return [str(place) for place in places if not place.is_dir()]


def _servers(config: RunConfig) -> list[Callable[[], None]]:
    """A proof per place on S3 that is written to, and that of MLflow."""
    roots = {root for root in (config.work_root, config.model_root) if root.startswith("s3://")}
    proofs: list[Callable[[], None]] = [partial(prove_store, root) for root in sorted(roots)]
    return [*proofs, partial(prerequisites.check_mlflow, config)]


def _estimate(config: RunConfig, found: Proved) -> dict[str, Any]:
    """The cost of the run, for which there must be room."""
    assert found.pool is not None
    source, target = (found.models[name][0] if name in found.models else None for name in MODELS)
    costs = estimate(config, found.pool, found.selected, source, target)
    prerequisites.check_disk(config, costs["bytes"])
    return costs


def stage_configs(config: RunConfig) -> dict[str, dict[str, Any]]:
    """One resolved configuration per stage: no paths, and what the chain decides for all of them.

    Raises:
        UserError: a stage's value is out of its range, or two stages' values do not fit.
    """
    budget = parse_budget(config.budget)
    common = {"seed": config.seed, "threads": config.threads}
    extra: dict[str, dict[str, Any]] = {"select": budget, "baseline": dict(budget)}
    extra["verify"] = {"dtype": config.convert.dtype}
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
        try:
            _validate(cls, stages[name], planted="oracle" in config.arms and name == "baseline")
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    recipe, mode = config.warmup.recipe, config.convert.model.gate_mode
    if mode != (needed := RECIPES[recipe][0]):
        raise UserError(f"warmup.recipe={recipe} does not fit convert.model.gate_mode={mode}: it needs {needed}")
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
        if not leaf.default or leaf.default == "???":
            given = "given-by-the-run"
            setattr(node, last, [given] if isinstance(leaf.default, list) or "list" in str(leaf.type) else given)
    config.validate()


def _check_models(
    config: RunConfig, proofs: prerequisites.Proofs, lacking: Collection[str], scratch: Path
) -> dict[str, tuple[Model, Glimpse]]:
    """Every model that is named and there, by its key; a mistake is said once where both keys name the same model."""
    models: dict[str, tuple[Model, Glimpse]] = {}
    for name in MODELS:
        given = getattr(config, name)
        if given in ("", *lacking):
            continue
        if name == "target_model" and given == config.source_model:
            found = models.get("source_model")
        else:
            found = proofs.attempt(check_model, config, name, scratch / name)
        if found:
            models[name] = found
    return models


def check_model(config: RunConfig, name: str, scratch: Path) -> tuple[Model, Glimpse]:
    """Sizes of a model; proves that it is there, whole, with a tokenizer, and of a kind that fits its role.

    Raises:
        UserError: it is not.
    """
    given = getattr(config, name)
    found = look(given, name, scratch)
    kinds, advice = _kinds(config, name)
    try:
        source = checkpoint.read(found.folder, f"{name}={given}", kinds, advice)
        model = prerequisites.read_model(source, headers=found.whole)
        if name == "source_model" and config.judge == "upcycle":
            olmoe_config(source.config, config.upcycle)
        if not any((found.folder / file).is_file() for file in VOCABULARIES):
            raise UserError(
                f"{name}={given} has no tokenizer ({' or '.join(VOCABULARIES)}): save it beside the weights"
            )
        _prove_tokenizer(found.folder)
    except UserError as error:
        raise UserError(str(error).replace(str(scratch), given)) from None
    return model, found


def _prove_tokenizer(folder: Path) -> None:
    """Whether the stages can load the tokenizer: where its files do not say so, it is loaded, which takes seconds.

    Raises:
        UserError: they cannot.
    """
    if not {"model", "eos_token"} <= {*_keys(folder / "tokenizer.json"), *_keys(folder / "tokenizer_config.json")}:
        from selectmoe.template import load_tokenizer

        load_tokenizer(folder)


def _keys(file: Path) -> list[str]:
    """Keys that have a value in a JSON file; none where there is no such file, or it is not JSON."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [key for key, value in found.items() if value] if isinstance(found, dict) else []


def _kinds(config: RunConfig, name: str) -> tuple[tuple[str, ...], str]:
    """The model types that a role takes, and what to do with another."""
    if name == "source_model" and config.judge == "olmoe":
        return ("olmoe",), "give an OLMoE checkpoint, or judge=upcycle for a Llama-like one"
    if name == "source_model" and config.judge == "upcycle":
        return DENSE, f"judge=upcycle takes {', '.join(DENSE)}"
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), "give a causal language model"


def code_digest() -> str:
    """Digest of this package's own source: a changed program is a changed task for KFP's cache."""
    root = Path(__file__).parent
    return manifest.digest(
        [[p.relative_to(root).as_posix(), manifest.sha256_file(p)] for p in sorted(root.rglob("*.py"))]
    )


def run(config: RunConfig, found: Plan | None = None) -> Path:
    """Write `check.json`, and print the estimate; with `dry_run` only print it.

    Args:
        config: of the whole run.
        found: its plan; default: it is made.

    Returns:
        The folder.

    Raises:
        UserError: as `plan`.
    """
    if config.dry_run:
        preview(config)
        return Path(config.output_dir)
    found = found or plan(config)
    print(f"check: all prerequisites are there\n{describe(found.estimate)}", file=sys.stderr)
    text = json.dumps(dataclasses.asdict(found), indent=1, sort_keys=True) + "\n"
    place = dataclasses.replace(config, work_root="")
    inputs = {name: {"uri": uri, "identity": found.digests[name]} for name, uri in found.uris.items()}
    inputs |= {"data": {"uri": config.data, "identity": found.digests["pool"]}}
    with stage.begin(STAGE, VERSION, place, inputs=inputs) as out:
        if out.done and (out.path / "check.json").read_text(encoding="utf-8") == text:
            return out.path
        if not out.done:
            (out.staging / "check.json").write_text(text, encoding="utf-8")
            rows = found.estimate["rows"]
            out.commit(rows_in=rows, rows_out=rows, bookkeeping=["check.json"])
            return out.path
    for name in (manifest.NAME, "check.json"):  # the same work is to be done in another way, say in more shards
        (out.path / name).unlink()
    return run(config, found)
