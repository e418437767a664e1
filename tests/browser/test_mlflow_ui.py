"""What a person sees in MLflow's pages after a run, in a real browser: `make browser-test`.

A tiny run is made and published as the pipeline publishes it, to a real MLflow server; Chromium opens its pages. The
screenshots lie in `build/browser/`. Needs `apt-get install chromium chromium-driver`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support import expected_conditions as seen
from selenium.webdriver.support.wait import WebDriverWait

from selectmoe import manifest
from tests.integration.mlflow_server import MlflowServer

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "build" / "browser"
PARENT = "tiny run"
PATIENCE = 40
"""Seconds that an element may take to appear: MLflow's pages come in many scripts and requests."""
NAMES = "[col-id='attributes.`Run Name`'] a"
pytestmark = pytest.mark.timeout(900)  # the first test makes the run
ARMS = ("selected", "random")
SEEDS = range(3)


@dataclass(frozen=True)
class Published:
    """A run on disk, and where MLflow shows it."""

    root: Path
    experiment: str
    """Address of the experiment."""
    runs: dict[str, str]
    """The runs that have the artifacts of an output, by its identity."""

    def artifacts(self, output: str) -> str:
        """Address of the artifacts of an output, which is named by its folder."""
        identity = manifest.read_manifest(self.root / output, verify=False).identity
        return f"{self.experiment}/runs/{self.runs[identity]}/artifacts"


@pytest.fixture(scope="module")
def programs() -> dict[str, str]:
    """Chromium and its driver; asked for before anything is started."""
    found = {name: shutil.which(name) or "" for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in found.items() if not path]:
        pytest.exit(f"no {' and no '.join(missing)}: apt-get install chromium chromium-driver", returncode=2)
    return found


@pytest.fixture(scope="module")
def published(programs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    folder = tmp_path_factory.mktemp("tiny")
    server = MlflowServer(folder)
    server.start(wait=False)  # it comes up while the run is made
    try:
        arms = f"arms=[{','.join(ARMS)}]"
        command = [sys.executable, "-m", "selectmoe", "run", "preset=tiny", arms, f"seeds={len(SEEDS)}"]
        command += [f"output_dir={folder / 'run'}", f"demo_dir={folder / 'demo'}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        server.wait()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_TRACKING_URI", server.url)
            patch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
            yield publish(folder / "run", folder / "work")
    finally:
        server.kill()


def publish(root: Path, work: Path) -> Published:
    """Send what the report rests on to MLflow, as `make run` does."""
    from mlflow import MlflowClient

    from pipelines import local
    from selectmoe import sending

    report = root / "report"
    parent = sending.start_parent(PARENT, {"preset": "tiny"}, str(work))
    for output in reversed(local._lineage(report)):
        sending.submit(output, str(work), parent)
    sending.finish_parent(parent, str(work), tags=sending.verdict_tags(report))
    sending.sync(str(work))
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    number = client.get_experiment_by_name("select-moe").experiment_id
    found = client.search_runs([number], "tags.`select_moe.sent` = 'all'")
    return Published(
        root,
        f"{os.environ['MLFLOW_TRACKING_URI']}/#/experiments/{number}",
        {run.data.tags["select_moe.identity"]: run.info.run_id for run in found},
    )


@pytest.fixture(scope="module")
def chromium(programs: dict[str, str]) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = programs["chromium"]
    quiet = ["headless", "disable-gpu", "disable-background-networking", "no-first-run", "disable-dev-shm-usage"]
    for name in [*quiet, "window-size=1800,1400", *(["no-sandbox"] if os.geteuid() == 0 else [])]:
        options.add_argument(f"--{name}")
    driver = Chrome(options, Service(programs["chromedriver"]))
    yield driver
    driver.quit()


@pytest.fixture
def page(chromium: Chrome, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Iterator[Chrome]:
    """A fresh page; a screenshot of how the test left it, failed or not."""
    chromium.get("about:blank")  # MLflow does not open another address of a run that is already on the page
    yield chromium
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    path = SCREENSHOTS / f"{request.node.name.removeprefix('test_')}.png"
    chromium.switch_to.default_content()
    chromium.save_screenshot(str(path))
    with capsys.disabled():
        print(f"\nscreenshot: {path.relative_to(ROOT)}")


def wait(page: Chrome) -> WebDriverWait[Chrome]:
    return WebDriverWait(page, PATIENCE)


def artifact(page: Chrome, published: Published, output: str, path: str) -> WebElement:
    """Open an artifact at its address; the part of the page that shows it."""
    page.get(f"{published.artifacts(output)}/{path}")
    wait(page).until(seen.visibility_of_element_located((By.CSS_SELECTOR, f"[title='{path}']")))
    return page.find_element(By.CLASS_NAME, "mlflow-artifact-right")


def test_experiment_page(page: Chrome, published: Published) -> None:
    page.get(f"{published.experiment}/runs")
    parent = (By.XPATH, f"//*[@role='gridcell'][.//a[normalize-space()='{PARENT}']]")
    wait(page).until(seen.visibility_of_element_located(parent))
    assert [name.text for name in page.find_elements(By.CSS_SELECTOR, NAMES)] == [PARENT], "the stages are nested"
    page.find_element(*parent).find_element(By.TAG_NAME, "button").click()
    tasks = {f"{stage} {arm}:{seed}" for stage in ("finetune", "evaluate") for arm in ARMS for seed in SEEDS}
    single = {"ingest", "pretrain", "convert", "verify", "warmup", "route", "select", "baseline", "report"}
    expected = {PARENT, "evaluate base:0"} | single | tasks
    wait(page).until(
        lambda page: expected <= {name.text for name in page.find_elements(By.CSS_SELECTOR, NAMES)},
        f"not all of {sorted(expected)}",
    )


def test_report(page: Chrome, published: Published) -> None:
    page.get(published.artifacts("report"))
    entry = (By.CSS_SELECTOR, "[data-testid='artifact-tree-node'][artifact-name='report.html']")
    wait(page).until(seen.element_to_be_clickable(entry)).click()
    frame = wait(page).until(seen.presence_of_element_located((By.CSS_SELECTOR, "iframe.mlflow-html-iframe")))
    assert "allow-same-origin" not in (frame.get_attribute("sandbox") or "allow-same-origin"), "it is sandboxed"
    page.switch_to.frame(frame)
    results = json.loads((published.root / "report" / "results.json").read_text(encoding="utf-8"))
    wait(page).until(lambda page: results["sentence"] in " ".join(page.find_element(By.TAG_NAME, "body").text.split()))
    plots = page.find_elements(By.TAG_NAME, "img")
    assert len(plots) >= 3, "effects, composition, map"
    for plot in plots:
        wait(page).until(lambda _, plot=plot: plot.is_displayed() and plot.get_property("naturalWidth") > 0)


def test_selection(page: Chrome, published: Published) -> None:
    rows = (published.root / "select" / "selected_data.jsonl").read_text(encoding="utf-8").splitlines()
    shown = artifact(page, published, "select", "selected_data.jsonl")
    wait(page).until(lambda _: json.loads(rows[-1])["id"] in shown.text)
    text = shown.text
    assert all(json.loads(row)["id"] in text for row in rows)


def test_router_data(page: Chrome, published: Published) -> None:
    file = sorted((published.root / "merge" / "router_data").glob("*/*.parquet"))[0]
    rows = pq.read_table(file)
    shown = artifact(page, published, "merge", f"previews/router_data/{file.parent.name}/{file.stem}.csv")
    wait(page).until(lambda _: f"first {rows.num_rows} rows" in shown.text)
    assert rows["id"][0].as_py() in shown.text
    assert {"id", "tokens", "answer_tokens"} <= set(shown.text.split())
