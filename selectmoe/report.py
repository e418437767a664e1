"""Everything above to tables, plots and the verdict, in one self-contained HTML page.

    selectmoe report runs=[outputs/quick] output_dir=outputs/report

In: the outputs of a run, found by their manifests. Out: `report.html` (no network, at most 5 MiB, opens in MLflow's
artifact viewer), `summary.md` (the answer in a few lines), `results.json` (every number shown) and `verdict.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from selectmoe import stage
from selectmoe.config import StageConfig, execution, group, identity, input_
from selectmoe.errors import Refused, UserError
from selectmoe.manifest import Manifest, read_manifest

STAGE = "report"
VERSION = 2
GATES = ("off", "warn", "fail")
LIMIT = 5 * 2**20
"""Bytes of the page at most."""
METRICS = ("held-out answer bits per byte",)


@dataclass
class VerdictConfig:
    """What is asked, fixed before anything runs."""

    metric: str = identity(METRICS[0], doc=f"what arms are compared by: {', '.join(METRICS)}")


@dataclass
class ReportConfig(StageConfig):
    """Configuration of `report`."""

    runs: list[str] = input_([], doc="outputs of a run: folders, which may hold several")
    root_dir: str = input_("", doc="one folder that holds all outputs of a run, instead of runs")
    verdict: VerdictConfig = group(VerdictConfig)
    gate: str = execution("warn", doc="unless the verdict is beats_random: off: nothing, warn: say so, fail: exit 3")
    show_text: bool = execution(True, doc="show the text of some rows; false where the page is for other eyes")

    def validate(self) -> None:
        """Check the names.

        Raises:
            UserError: one is unknown, or not exactly one of runs and root_dir is given.
        """
        if self.gate not in GATES:
            raise UserError(f"gate={self.gate!r} is unknown; known: {', '.join(GATES)}")
        if self.verdict.metric not in METRICS:
            raise UserError(f"verdict.metric={self.verdict.metric!r} is unknown; known: {', '.join(METRICS)}")
        if bool(self.runs) == bool(self.root_dir):
            raise UserError("runs= or root_dir=, exactly one of them, names the outputs of a run")


def run(config: ReportConfig) -> Path:
    """Write the report.

    Returns:
        The output directory.

    Raises:
        UserError: an output that the report needs is missing or does not fit the others.
        Refused: `gate=fail` and the verdict is not *beats random*; the report is written all the same.
    """
    config.validate()
    from selectmoe import report_data

    outputs = report_data.find(config.runs or [config.root_dir])
    with stage.begin(STAGE, VERSION, config, inputs={"runs": [str(path) for path, _ in outputs]}) as out:
        if out.done:
            _same_page(out.path, config)
        else:
            _make(out, config, outputs)
    gate(out.path, config.gate)
    return out.path


def gate(report: Path, mode: str) -> None:
    """Say, or refuse, where the verdict is not *beats random*.

    Args:
        report: what `run` (or `compare`) wrote.
        mode: off: nothing, warn: say so, fail: refuse.

    Raises:
        Refused: the mode is `fail` and the verdict is another.
    """
    results = json.loads((report / "results.json").read_text(encoding="utf-8"))
    if results["verdict"]["verdict"] == "beats_random" or mode == "off":
        return
    judged = "the selection does not beat random: " if results["verdict"]["arms"] else ""
    message = judged + results["sentence"]
    if mode == "fail":
        raise Refused(message)
    print(f"gate: {message}", flush=True)


def _same_page(path: Path, config: ReportConfig) -> None:
    """A finished report may show text, or lack text, that is now wanted otherwise, although its identity is the same."""
    there = read_manifest(path).config["execution"]["show_text"]
    if there != config.show_text:
        raise UserError(
            f"{path} holds this report made with show_text={str(there).lower()}: remove it, or choose another output_dir"
        )


def _make(out: stage.Output, config: ReportConfig, outputs: list[tuple[Path, Manifest]]) -> None:
    from selectmoe import report_composition, report_data, report_html, report_markdown

    found = report_data.collect(outputs)
    judged = report_data.verdict(found, config.verdict.metric)
    bits = report_data.metrics(found)
    results = {
        "verdict": judged.json(),
        **judged.details(),
        "seeds": report_data.seeds(found),
        "bits_per_byte": bits,
        "summary": report_data.summary(bits),
        "auc": report_data.aucs(found),
        "composition": report_composition.composition(found),
        "planted_share": report_composition.planted_share(found),
        "examples": report_data.examples(found),
        "stages": report_data.stages(found),
    }
    page = report_html.page(found, judged, results, show_text=config.show_text).encode("utf-8", "replace")
    if len(page) > LIMIT:
        raise RuntimeError(f"report.html has {len(page)} bytes, more than {LIMIT}: a table or a plot is not bounded")
    _write(out.staging / "verdict.json", judged.json())
    _write(out.staging / "results.json", results)
    (out.staging / "report.html").write_bytes(page)
    summary = report_markdown.summary(judged, results)
    (out.staging / "summary.md").write_text(summary, encoding="utf-8", errors="replace")
    out.metric("verdict/effect", judged.arms[0].effect)
    for name, values in bits.items():
        out.metric(f"bits_per_byte/{name}", sum(values) / len(values))
    out.commit(bookkeeping=["report.html", "summary.md", "results.json"])


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
