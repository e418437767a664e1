"""Stage 4: held-out answer bits per byte, and lm-eval's tasks, of the target model with or without an adapter.

    selectmoe evaluate model=MODEL holdout=INGESTED arm=base seed=0 output_dir=OUT
    selectmoe evaluate model=MODEL adapters=[FINETUNED] holdout=INGESTED arm=selected seed=1 output_dir=OUT
    selectmoe evaluate model=MODEL tasks=[mine] include_path=TASKS limit=100 output_dir=OUT

In: a causal language model, at most one LoRA adapter, a holdout, names of tasks (`include_path`: a folder of task files).
Out: `results.parquet`, one line per example: task, dataset, id (string), value, weight (float64); for task `holdout` the value
is the answer's bits and the weight its UTF-8 bytes (`selectmoe.heldout`), for a task of lm-eval the value is its metric (acc
where it has one) and the weight 1. `evaluation.json`: the same in summary. `lm_eval/`: lm-eval's results in its own format.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selectmoe import stage
from selectmoe.config import StageConfig, execution, identity, input_
from selectmoe.errors import UserError
from selectmoe.manifest import identity_of
from selectmoe.pool import locate, read_pool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STAGE = "evaluate"
VERSION = 1
HOLDOUT = "holdout"
RESULTS = "results.parquet"
SUMMARY = "evaluation.json"
DEFAULT_TASKS = ("mmlu", "bbh")
"""What is evaluated where neither tasks nor a holdout are given."""


@dataclass(frozen=True, slots=True)
class Result:
    """One example's result; see the module's text."""

    task: str
    dataset: str
    id: str
    value: float
    weight: float


@dataclass
class EvaluateConfig(StageConfig):
    """Configuration of stage `evaluate`."""

    model: str = input_(doc="the target model: a checkpoint folder or a hub name")
    adapters: list[str] = input_([], doc="output of finetune, at most one; none: the model as it is")
    holdout: str = input_("", doc="ingest's output_dir, or its holdout folder")
    include_path: str = input_("", doc="folder of lm-eval task files of your own")
    include_digest: str = execution("", doc="identity that include_path must have; a run sets it, for KFP's cache")
    arm: str = identity("base", doc="which arm the adapter belongs to")
    layers: int = identity(0, doc="cut the model to its first n layers, as finetune did; 0: all")
    tasks: list[str] | None = identity(
        None, doc="lm-eval tasks; default: mmlu and bbh where no holdout is given, else none"
    )
    limit: int = identity(0, doc="examples per lm-eval task; 0: all")
    batch_size: int = identity(16, doc="rows per forward pass; limited by memory")
    max_length: int = identity(2048, doc="tokens of a row; a longer row of the holdout is left out, with a reason")

    def validate(self) -> None:
        """Check the values.

        Raises:
            UserError: one is out of its range.
        """
        if len(self.adapters) > 1:
            raise UserError(f"adapters={self.adapters}: at most one; start evaluate once per adapter")
        if self.tasks == [] and not self.holdout:
            raise UserError("nothing to evaluate: give holdout= or tasks=")
        for name in ("layers", "limit", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must not be negative")
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} must be at least 1")
        if self.max_length < 2:
            raise UserError(f"max_length={self.max_length} must be at least 2")
        if not self.arm:
            raise UserError("arm= is empty: name the arm, or base")


def run(config: EvaluateConfig) -> Path:
    """Evaluate.

    Returns:
        The folder of the results.

    Raises:
        UserError: the model, adapter, holdout or a task is not there or not usable.
    """
    holdout = str(locate(config.holdout, "holdout")) if config.holdout else ""
    if config.include_path and not Path(config.include_path).is_dir():
        raise UserError(f"include_path={config.include_path} is no folder: give a local folder of task files")
    if config.include_digest not in ("", identity_of(config.include_path) if config.include_path else ""):
        raise UserError(f"include_path={config.include_path} is no longer what `check` saw: start the run again")
    tasks = config.tasks if config.tasks is not None else [] if holdout else list(DEFAULT_TASKS)
    from selectmoe import finetuning

    path = finetuning.find_model(config.model, "model")
    inputs = {"model": str(path), "adapters": config.adapters, "holdout": holdout, "include_path": config.include_path}
    with stage.begin(STAGE, VERSION, config, inputs=inputs) as out:
        if out.done:
            return out.path
        manager = task_manager(tasks, config.include_path) if tasks else None
        model, tokenizer = _load(config, path)
        results, dropped = _holdout(config, model, tokenizer, holdout, out) if holdout else ([], {})
        metrics = {HOLDOUT: "answer bits per byte"} if holdout else {}
        if tasks:
            examples, names = _tasks(config, model, tokenizer, tasks, manager, out.staging / "lm_eval")
            results += examples
            metrics |= names
        write_results(out.staging / RESULTS, results)
        by_task = summarise(results, metrics)
        summary = {"arm": config.arm, "seed": config.seed, "tasks": by_task}
        text = json.dumps(summary, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        (out.staging / SUMMARY).write_text(text, encoding="utf-8")
        for task, entry in by_task.items():
            out.metric(f"evaluate/{task}", entry["value"])
        out.commit(
            rows_in=len(results) + sum(dropped.values()),
            rows_out=len(results),
            dropped=dropped,
            bookkeeping=["lm_eval/*"],
        )
    return out.path


def _load(config: EvaluateConfig, path: Path) -> tuple[Any, PreTrainedTokenizerBase]:
    from selectmoe import finetuning
    from selectmoe.device import default_dtype, deterministic, pick_device, set_threads
    from selectmoe.template import load_tokenizer

    set_threads(config.threads)
    deterministic(config.seed)
    device = pick_device()
    model = finetuning.load_model(path, config.layers, default_dtype(device), device)
    if config.adapters:
        model = finetuning.load_adapter(model, Path(config.adapters[0]))
    return model.eval(), load_tokenizer(path)


def _holdout(
    config: EvaluateConfig, model: Any, tokenizer: PreTrainedTokenizerBase, folder: str, out: stage.Output
) -> tuple[list[Result], dict[str, int]]:
    from selectmoe import heldout

    rows, encoded, dropped = heldout.measurable(read_pool(folder), tokenizer, config.max_length)
    if not rows:
        raise UserError(f"no row of the holdout {folder} can be measured: {dropped}; is max_length too small?")
    eos, padding = int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)
    bits = heldout.answer_bits(model, encoded, eos, padding, config.batch_size, out)
    pairs = zip(rows, bits, strict=True)
    return [Result(HOLDOUT, r.dataset, r.id, b, float(heldout.answer_bytes(r))) for r, b in pairs], dropped


def task_manager(tasks: Sequence[str], include_path: str) -> Any:
    """lm-eval's index of tasks: the local ones alone (fast) where they are all that is asked for.

    Raises:
        UserError: an unknown task.
    """
    from lm_eval.tasks import TaskManager

    for defaults in [False, True] if include_path else [True]:
        manager = TaskManager(include_path=include_path or None, include_defaults=defaults)
        missing = [task for task in tasks if task not in manager.all_tasks]
        if not missing:
            return manager
    where = f" or {include_path}" if include_path else "; for tasks of your own give include_path="
    raise UserError(f"tasks: {missing[0]!r} is no task of lm-eval{where}")


def _tasks(
    config: EvaluateConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    manager: Any,
    folder: Path,
) -> tuple[list[Result], dict[str, str]]:
    """Run lm-eval; returns the examples and the metric of each task, and writes its own files into `folder`."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import handle_non_serializable

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size, max_length=config.max_length)
    raw = simple_evaluate(
        model=lm,
        tasks=list(tasks),
        limit=config.limit or None,
        task_manager=manager,
        log_samples=True,
        bootstrap_iters=0,
    )
    folder.mkdir()
    samples = raw.pop("samples")
    text = json.dumps(raw, indent=2, default=handle_non_serializable, ensure_ascii=False)
    (folder / "results.json").write_text(text, encoding="utf-8")
    results: list[Result] = []
    metrics: dict[str, str] = {}
    for task in sorted(samples):
        lines = (json.dumps(s, default=handle_non_serializable, ensure_ascii=False) + "\n" for s in samples[task])
        (folder / f"samples_{task}.jsonl").write_text("".join(lines), encoding="utf-8")
        metrics[task], examples = examples_of(task, samples[task])
        results += examples
    return results, metrics


def examples_of(task: str, samples: Sequence[dict[str, Any]]) -> tuple[str, list[Result]]:
    """The primary metric of a task (acc where there is one, else its first) and every example's value of it.

    Args:
        task: its name.
        samples: what lm-eval logged; where it applied several filters, the first one counts.

    Raises:
        UserError: the metric is not a number per example.
    """
    first = samples[0].get("filter")
    chosen = [s for s in samples if s.get("filter") == first]
    names = list(chosen[0]["metrics"])
    metric = "acc" if "acc" in names else names[0]
    try:
        return metric, [Result(task, task, str(s["doc_id"]), float(s[metric]), 1.0) for s in chosen]
    except (TypeError, ValueError):
        raise UserError(
            f"task {task}: its metric {metric} is no number per example (perplexity tasks are not)"
        ) from None


def summarise(results: Iterable[Result], metrics: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Per task: its metric, `value` (mean over sources of sum(values) / sum(weights)), the sources, the examples."""
    sums: dict[str, dict[str, list[float]]] = {task: {} for task in metrics}
    for r in results:
        entry = sums[r.task].setdefault(r.dataset, [0.0, 0.0, 0.0])
        entry[:] = [entry[0] + r.value, entry[1] + r.weight, entry[2] + 1]
    out = {}
    for task, sources in sums.items():
        values = {name: total / weight for name, (total, weight, _) in sorted(sources.items())}
        examples = int(sum(n for _, _, n in sources.values()))
        mean = sum(values.values()) / len(values)
        out[task] = {"metric": metrics[task], "value": mean, "sources": values, "examples": examples}
    return out


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Write `results.parquet`, the same bytes for the same results."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, real = pa.string(), pa.float64()
    schema = pa.schema([("task", text), ("dataset", text), ("id", text), ("value", real), ("weight", real)])
    columns = {name: [getattr(r, name) for r in results] for name in schema.names}
    pq.write_table(pa.table(columns, schema=schema), path, compression="zstd", version="2.6", store_schema=False)


def read_results(path: Path | str) -> list[Result]:
    """The results of an evaluation, in the order in which they were written.

    Args:
        path: output of `evaluate`.

    Raises:
        UserError: there is no results.parquet.
    """
    import pyarrow.parquet as pq

    file = Path(path) / RESULTS
    if not file.is_file():
        raise UserError(f"{path} holds no {RESULTS}: it is not an output of evaluate")
    return [Result(**record) for record in pq.read_table(file).to_pylist()]
