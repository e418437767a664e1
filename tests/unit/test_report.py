"""`selectmoe.report`: what it finds, what it says, what it refuses: pytest tests/unit/test_report.py

The run is made by hand (`make_run`), no model takes part.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selectmoe import cli
from selectmoe import report as report_stage
from selectmoe.config import load
from selectmoe.errors import Refused, UserError
from selectmoe.evaluate import HOLDOUT, Result, write_results
from selectmoe.manifest import read_manifest, write_manifest
from selectmoe.pool import Row, write_pool
from selectmoe.report import ReportConfig, run
from selectmoe.router_data import RouterData
from selectmoe.selection import Selected, write_clusters, write_selected
from tests.pools import make_router_data

HOSTILE = "<script>alert('x')</script> & \"quoted\""
KEYS = [(name, f"{name}{i:02}") for name in ("a", "b") for i in range(10)]
PLANTED = {key: ("shuffled", "repeated")[i % 2] for i, key in enumerate(KEYS) if key[1][1:] >= "06"}


def manifest(folder: Path, stage: str, **identity: Any) -> Path:
    """Finish a folder that was filled by hand."""
    write_manifest(
        folder,
        stage=stage,
        version=1,
        config={"identity": {"seed": 42} | identity, "execution": {"output_dir": folder.name}},
        inputs={},
        rows={"in": 3, "out": 2, "dropped": {"too short": 1}},
        environment={"seconds": 1.5, "peak_rss_bytes": 2**20},
        created="2020-01-01T00:00:00+00:00",
    )
    return folder


def jsonl(path: Path, records: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")


def routed() -> RouterData:
    """Router data in which planted rows have lower gate scores, except the two rows of the warm-up."""
    n = len(KEYS)
    good = np.array([[0.1 if k in PLANTED else 0.9] for k in KEYS], np.float32)
    good[KEYS.index(("a", "a06"))] = 0.95  # in the warm-up: must not count against the judge
    good += np.linspace(0, 0.01, n, dtype=np.float32)[:, None]
    whole = np.arange(1, n + 1)
    return RouterData(
        [d for d, _ in KEYS], [i for _, i in KEYS], whole, whole, np.zeros(n, bool), np.linspace(1, 2, n),
        np.full(n, 2.0), whole, good, good, good, good, np.full((n, 1, 2), 0.5, np.float32),
    )  # fmt: skip


def evaluation(folder: Path, arm: str, seed: int, shift: float) -> None:
    """An evaluation with `shift` bits per byte more than a common level."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, len(arm)])
    noise = rng.normal(0, 0.002, 40)
    results = [
        Result(HOLDOUT, "ab"[i % 2], f"h{i}", 10 * (1 + i / 100 + shift + float(noise[i])), 10.0) for i in range(40)
    ]
    write_results(folder / "results.parquet", results)
    manifest(folder, "evaluate", arm=arm, seed=seed)


def make_run(root: Path, *, gain: float = 0.1, oracle: float | None = None, seeds: int = 3) -> Path:
    """A finished run; `gain` and `oracle` are what these arms win over random, in bits per byte."""
    rows = [Row(d, i, [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": i}]) for d, i in KEYS]
    ingest = root / "ingest"
    for part, kept in (("pool", rows), ("holdout", rows[:2])):
        (ingest / part).mkdir(parents=True)
        write_pool(ingest / part, kept)
        manifest(ingest / part, "ingest")
    jsonl(ingest / "planted.jsonl", [{"dataset": d, "id": i, "kind": kind} for (d, i), kind in PLANTED.items()])
    manifest(ingest, "ingest")
    (root / "warmup").mkdir()
    jsonl(root / "warmup" / "warmup_rows.jsonl", [{"dataset": "a", "id": "a00"}, {"dataset": "a", "id": "a06"}])
    manifest(root / "warmup", "warmup")
    make_router_data(root / "merge", routed())
    (root / "select").mkdir()
    chosen = [rows[0], rows[1], rows[10], rows[19]]  # the last one is planted
    write_selected(root / "select" / "selected_data.jsonl", [Selected(r, {"answer": 0.9}, 0, 1) for r in chosen])
    for draw in range(2):  # of arm random
        folder = root / "baseline" / f"random-{draw}"
        folder.mkdir(parents=True)
        write_selected(folder / "selected_data.jsonl", [Selected(r, {}, None, None) for r in rows[draw : draw + 4]])
        manifest(folder, "select", method="random", seed=draw)
    (root / "baseline" / "arms.json").write_text("{}")
    manifest(root / "baseline", "baseline")
    ranks = {r.key: n for n, r in enumerate(chosen, 1)}
    columns: dict[str, list[Any]] = {"dataset": [d for d, _ in KEYS], "id": [i for _, i in KEYS]}
    columns |= {name: [0.5] * len(KEYS) for name in ("score", "distance")} | {"cluster": [0, 1] * 10}
    columns |= {"x": list(range(20)), "y": list(range(20)), "selected_rank": [ranks.get(k) for k in KEYS]}
    write_clusters(root / "select" / "clusters.parquet", columns)
    manifest(root / "select", "select", method="kmeans")
    shifts = {"selected": -gain, "random": 0.0} | ({} if oracle is None else {"oracle": -oracle})
    for arm, shift in shifts.items():
        for seed in range(seeds):
            evaluation(root / "evaluate" / f"{arm}-{seed}", arm, seed, shift + 0.001 * seed)
    evaluation(root / "evaluate" / "base-0", "base", 0, 0.3)
    return root


def outputs(root: Path) -> list[str]:
    """The outputs of the run, as the chain names them."""
    parts = [root / name for name in ("ingest", "warmup", "merge", "select", "baseline")]
    return [str(p) for p in [*parts, *sorted((root / "evaluate").iterdir())]]


def report(root: Path, to: Path, **keys: Any) -> Path:
    """Run the stage."""
    return run(load(ReportConfig, {"runs": outputs(root), "output_dir": str(to), **keys}))


def read(path: Path, name: str) -> Any:
    """A JSON file of the report."""
    return json.loads((path / name).read_text(encoding="utf-8"))


class Page(HTMLParser):
    """Tags and their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect."""
        self.tags.append((tag, dict(attrs)))


def test_verdict_json_has_the_keys_of_the_format_and_belongs_to_the_identity(tmp_path: Path) -> None:
    out = report(make_run(tmp_path / "run", oracle=0.2), tmp_path / "report")
    answer = read(out, "verdict.json")
    assert set(answer) == {"verdict", "metric", "arms", "seeds", "examples"}
    assert (answer["verdict"], answer["seeds"], answer["examples"]) == ("beats_random", 3, 40)
    arm = answer["arms"][0]
    assert set(arm) == {"name", "verdict", "effect", "ci95", "p", "df", "smallest_visible_effect"}
    results = read(out, "results.json")
    assert results["verdict"] == answer
    assert results["sentence"].startswith("selected beats random")
    assert results["visible"] is True
    assert results["arms"]["oracle"]["control"]
    assert arm["name"] == "selected"
    assert arm["effect"] == pytest.approx(0.1, abs=0.01)
    files = {f["path"]: f["result"] for f in read_manifest(out).files}
    assert files["verdict.json"]
    assert not files["report.html"]
    assert not files["results.json"]
    assert not files["summary.md"]


def test_page_is_self_contained_escaped_and_small(tmp_path: Path) -> None:
    out = report(make_run(tmp_path / "run", oracle=0.2), tmp_path / "report")
    text = (out / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "form", "object"}
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style
    allowed = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    policy = next(str(a["content"]) for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{allowed}'; img-src data:;")
    assert not any(name in ("href", "style", "onclick") for _, a in page.tags for name in a)
    order = [tag if tag == "img" else a["class"] for tag, a in page.tags if tag == "img" or "verdict" in str(a)]
    assert order[:2] == ["verdict beats_random", "img"]
    assert ("html", {"lang": "en"}) in page.tags
    images = [a for tag, a in page.tags if tag == "img"]
    assert len(images) == 4
    assert all(a["alt"] and str(a["src"]).startswith("data:image/") for a in images)
    assert all(a.get("scope") in ("col", "row") for tag, a in page.tags if tag == "th")
    assert len(text.encode()) < 5 * 2**20
    first = re.search(r"<p[^>]*>(.*?)</p>", text)
    assert first
    assert first[1].startswith("selected beats random")


def test_it_says_when_the_selection_did_not_beat_random_and_when_nothing_could_be_seen(tmp_path: Path) -> None:
    out = report(make_run(tmp_path / "run", gain=0.0, oracle=0.0), tmp_path / "report")
    text = (out / "report.html").read_text(encoding="utf-8").lower()
    assert read(out, "verdict.json")["verdict"] == "no_evidence"
    assert "no evidence that selected differs from random" in text
    assert "this run could not have seen an effect" in text
    assert "could not have seen an effect" in (out / "summary.md").read_text(encoding="utf-8")


def test_without_oracle_it_does_not_say_that_nothing_could_be_seen(tmp_path: Path) -> None:
    out = report(make_run(tmp_path / "run"), tmp_path / "report")
    assert "could not have seen" not in (out / "report.html").read_text(encoding="utf-8").lower()


def test_auc_leaves_out_the_rows_of_the_warm_up(tmp_path: Path) -> None:
    auc = read(report(make_run(tmp_path / "run"), tmp_path / "report"), "results.json")["auc"]["held_out"]
    assert set(auc) == {"any", "shuffled", "repeated"}
    for by_score in auc.values():
        assert set(by_score) == {"answer", "all", "legacy", "nll", "ifd", "combined", "length"}
        assert by_score["answer"] == 1.0  # a06, ranked among the best, was trained on


def test_numbers_of_the_selection_and_of_the_arms(tmp_path: Path) -> None:
    results = read(report(make_run(tmp_path / "run"), tmp_path / "report"), "results.json")
    assert results["planted_share"] == {"pool": 8 / 20, "selected": 1 / 4, "random": 0}
    assert results["composition"]["rows"] == {"pool": 20, "selected": 4, "random": 8}
    assert results["composition"]["sources"] == [
        {"name": "a", "pool": 10, "arms": {"selected": 2, "random": 8}},
        {"name": "b", "pool": 10, "arms": {"selected": 2}},
    ]
    bits = results["bits_per_byte"]
    assert {arm: len(v) for arm, v in bits.items()} == {"selected": 3, "random": 3, "base": 1}
    assert np.mean(bits["random"]) - np.mean(bits["selected"]) == pytest.approx(results["verdict"]["arms"][0]["effect"])


def test_lineage_names_every_output_with_its_identity_and_command(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run")
    out = report(root, tmp_path / "report")
    stages = read(out, "results.json")["stages"]
    text = (out / "report.html").read_text(encoding="utf-8")
    known = {read_manifest(path).identity for path in outputs(root)}
    assert known <= {s["identity"] for s in stages}
    assert all(s["identity"][:12] in text for s in stages)
    assert "1 too short" in text
    assert "selectmoe select method=kmeans seed=42 output_dir=select" in text
    assert {s["arm"] for s in stages if s["stage"] == "ingest"} == {"", "pool", "holdout"}
    for path in outputs(root):
        assert all(f["sha256"] in text for f in read_manifest(path).files)


def test_root_dir_is_runs_in_one_folder(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run")
    one = report(root, tmp_path / "one")
    two = run(load(ReportConfig, {"root_dir": str(root), "output_dir": str(tmp_path / "two")}))
    assert read_manifest(one).identity == read_manifest(two).identity


def test_nothing_planted_is_said_and_no_share_is_shown(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run")
    (root / "ingest" / "planted.jsonl").unlink()
    (root / "ingest" / "manifest.json").unlink()
    manifest(root / "ingest", "ingest")
    text = (report(root, tmp_path / "report") / "report.html").read_text(encoding="utf-8")
    assert "Nothing was planted" in text
    assert "share of planted rows" not in text


def test_two_selections_are_never_mixed(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run")
    other = root / "other"
    shutil.copytree(root / "select", other)
    (other / "manifest.json").unlink()
    manifest(other, "select", method="top")
    with pytest.raises(UserError, match="two different selections"):
        run(load(ReportConfig, {"root_dir": str(root), "output_dir": str(tmp_path / "report")}))


def test_a_warm_up_that_does_not_say_what_it_saw_is_refused(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run")
    (root / "warmup" / "warmup_rows.jsonl").unlink()
    (root / "warmup" / "manifest.json").unlink()
    manifest(root / "warmup", "warmup")
    with pytest.raises(UserError, match=r"warmup_rows\.jsonl is missing"):
        report(root, tmp_path / "report")


def test_row_text_can_be_switched_off_and_that_changes_no_identity(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run")
    without, shown = report(root, tmp_path / "without", show_text=False), report(root, tmp_path / "shown")
    assert "alert(" in (shown / "report.html").read_text(encoding="utf-8")
    for path in without.rglob("*"):
        assert not path.is_file() or b"alert(" not in path.read_bytes(), path
    assert read_manifest(without).identity == read_manifest(shown).identity


def test_a_finished_report_that_shows_text_is_not_passed_off_as_one_without(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run")
    report(root, tmp_path / "report")
    with pytest.raises(UserError, match=r"made with show_text=true: remove it"):
        report(root, tmp_path / "report", show_text=False)
    assert (tmp_path / "report" / "report.html").is_file()


def test_a_page_over_the_limit_is_an_error_and_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_stage, "LIMIT", 1000)
    with pytest.raises(RuntimeError, match="more than 1000"):
        report(make_run(tmp_path / "run"), tmp_path / "report")
    assert not (tmp_path / "report" / "manifest.json").exists()


def test_same_run_gives_the_same_page(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run")
    one, two = (report(root, tmp_path / name) for name in ("one", "two"))
    for name in ("report.html", "summary.md", "results.json", "verdict.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert read_manifest(one).identity == read_manifest(two).identity


def test_fewer_than_three_seeds_or_no_evaluation_is_the_users_mistake(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", seeds=2)
    with pytest.raises(UserError, match="at least 3"):
        report(root, tmp_path / "report")
    assert not (tmp_path / "report").exists()
    few = [p for p in outputs(root) if "/evaluate/" not in p]
    with pytest.raises(UserError, match="no evaluation"):
        run(load(ReportConfig, {"runs": few, "output_dir": str(tmp_path / "report")}))


def test_gate_refuses_only_after_the_report_was_written(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", gain=0.0)
    with pytest.raises(Refused, match="does not beat random"):
        report(root, tmp_path / "report", gate="fail")
    assert read(tmp_path / "report", "verdict.json")["verdict"] == "no_evidence"
    assert report(root, tmp_path / "report", gate="warn") == tmp_path / "report"
    assert report(root, tmp_path / "report", gate="off") == tmp_path / "report"


@pytest.mark.parametrize(
    ("gain", "gate", "code"), [(0.0, "off", 0), (0.0, "warn", 0), (0.0, "fail", 3), (-0.1, "fail", 3), (0.1, "fail", 0)]
)
def test_gate_decides_the_exit_code_after_everything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gain: float, gate: str, code: int
) -> None:
    make_run(tmp_path / "run", gain=gain)
    out = tmp_path / "report"
    assert cli.main(["report", f"root_dir={tmp_path / 'run'}", f"output_dir={out}", f"gate={gate}"]) == code
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == str(out)
    assert {f["path"] for f in read_manifest(out).files} >= {
        "report.html",
        "summary.md",
        "results.json",
        "verdict.json",
    }
    assert (out / ".hydra" / "overrides.yaml").is_file()
    assert ("does not beat random" in said.out) == (gate == "warn")
    assert ("does not beat random" in said.err) == (code == 3)


def test_gate_warns_unless_told_otherwise() -> None:
    assert ReportConfig.gate == "warn"


def test_gate_fail_lets_a_better_selection_pass(tmp_path: Path) -> None:
    assert report(make_run(tmp_path / "run"), tmp_path / "report", gate="fail").is_dir()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gate": "maybe"}, "gate="),
        ({"verdict": {"metric": "x"}}, "verdict.metric="),
        ({"runs": []}, "runs="),
        ({"root_dir": "x"}, "runs="),
    ],
)
def test_unknown_names_are_refused_before_any_work(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(ReportConfig, {"runs": ["x"], "output_dir": str(tmp_path / "report")} | keys)


def test_the_columns_are_the_seeds_that_were_used(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", seeds=0)
    for arm, shift in (("selected", -0.1), ("random", 0.0)):
        for seed in (7, 11, 13):
            evaluation(run_dir / "evaluate" / f"{arm}-{seed}", arm, seed, shift)
    page = (report(run_dir, tmp_path / "report") / "report.html").read_text(encoding="utf-8")
    assert [int(n) for n in re.findall(r">seed (\d+)<", page)] == [7, 11, 13]
    assert read(tmp_path / "report", "results.json")["seeds"] == [7, 11, 13]
