"""Everything above to tables, plots and the verdict, in one self-contained HTML page.

    selectmoe report runs=[outputs/quick] output_dir=outputs/report

In: the outputs of a run, found by their manifests. Out: `report.html` (no network, opens in MLflow's artifact viewer),
`results.json` (every number shown) and `verdict.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from selectmoe import stage
from selectmoe.config import StageConfig, execution, group, identity, input_
from selectmoe.errors import Refused, UserError

STAGE = "report"
VERSION = 1
GATES = ("off", "warn", "fail")
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
    show_text: bool = identity(True, doc="show the text of some rows")

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
        if not out.done:
            from selectmoe import report_html

            found = report_data.collect(outputs)
            judged = report_data.verdict(found, config.verdict.metric)
            bits = report_data.metrics(found)
            results = {
                "verdict": judged.json(),
                "seeds": report_data.seeds(found),
                "bits_per_byte": bits,
                "summary": report_data.summary(bits),
                "auc": report_data.aucs(found),
                "composition": report_data.composition(found),
                "planted_share": report_data.planted_share(found),
                "clusters": report_data.cluster_sizes(found),
                "examples": report_data.examples(found),
                "stages": report_data.stages(found),
            }
            _write(out.staging / "verdict.json", judged.json())
            _write(out.staging / "results.json", results)
            page = report_html.page(found, judged, results, show_text=config.show_text)
            (out.staging / "report.html").write_text(page, encoding="utf-8", errors="replace")
            arm = next(a for a in judged.arms if a.name == "selected")
            out.metric("verdict/effect", arm.effect)
            for name, values in bits.items():
                out.metric(f"bits_per_byte/{name}", sum(values) / len(values))
            out.commit(bookkeeping=["report.html", "results.json"])
    answer = json.loads((out.path / "verdict.json").read_text(encoding="utf-8"))
    if answer["verdict"] != "beats_random" and config.gate != "off":
        message = f"the selection does not beat random: {answer['sentence']}"
        if config.gate == "fail":
            raise Refused(message)
        print(f"gate: {message}", flush=True)
    return out.path


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
