"""`selectmoe inspect`: numbers, plots, page, and every kind of router data. Run: pytest tests/unit/test_inspect.py"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selectmoe import inspect, inspect_data, inspect_plots
from selectmoe import legacy_router_data as legacy
from selectmoe import router_data as rd
from selectmoe.cli import main
from selectmoe.config import load
from selectmoe.errors import UserError
from selectmoe.manifest import read_manifest, sha256_file, write_manifest
from selectmoe.scores import score, table
from tests.pools import make_router_data
from tests.unit.test_router_data import router_data

PNG = b"\x89PNG\r\n\x1a\n"
GATED = ("quality_score", "good_ratio", "quality_score_answer", "good_ratio_answer")


def look(place: Any, out: Path) -> dict[str, Any]:
    """The numbers of `inspect`."""
    places = [str(place)] if isinstance(place, Path) else [str(p) for p in place]
    config = load(inspect.InspectConfig, {"router_data_dir": places}, output_dir=str(out))
    return json.loads((inspect.run(config) / inspect.NUMBERS).read_text())


def plotted(out: Path) -> set[str]:
    return {path.stem for path in out.glob("*.png")}


def with_work(output: Path) -> Path:
    """Plans and timings as `route` leaves them."""
    manifest = read_manifest(output)
    about = {"stage": "route", "version": 1, "config": {"identity": {}, "execution": {}}, "inputs": {}}
    about |= {"rows": manifest.rows, "environment": {}, "created": "now"}
    units = []
    for part in manifest.parts:
        name = Path(part).name
        plan = {"digest": "x", "batches": 3, "rows": 5, "tokens": 100, "padded_tokens": 102}
        (output / part / "plan.json").write_text(json.dumps(plan))
        write_manifest(output / part, **about)
        for batch, seconds in enumerate((0.5, 2.0, 0.25)):
            unit = {"dataset": name, "batches": [batch, batch], "rows": 2, "tokens": 33, "padded_tokens": 34}
            units.append(unit | {"seconds": seconds})
    (output / "units.jsonl").write_text("".join(json.dumps(unit) + "\n" for unit in units))
    write_manifest(output, **about, parts=manifest.parts, bookkeeping=["units.jsonl"])
    return output


@pytest.fixture(scope="module")
def data() -> rd.RouterData:
    made = router_data(200, layers=3, experts=8)
    made.good_ratio_answer[5] = np.nan
    made.answer_tokens[5] = 0
    made.nll[5] = np.nan
    made.router_probs[:, 1, 2] /= 1e4  # dead
    made.router_probs[:, 2, 3] /= 30  # rare
    made.router_probs /= made.router_probs.sum(-1, keepdims=True)
    made.router_probs[7] = np.nan
    return made


@pytest.fixture(scope="module")
def output(data: rd.RouterData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_work(make_router_data(tmp_path_factory.mktemp("whole") / "route", data))


@pytest.fixture(scope="module")
def numbers(output: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return look(output, tmp_path_factory.mktemp("numbers") / "out")


def test_numbers_are_those_of_all_rows_at_once(numbers: dict[str, Any], data: rd.RouterData) -> None:
    assert (numbers["rows"], numbers["layers"], numbers["experts"], numbers["embedding"]) == (200, 3, 8, None)
    gates = data.good_ratio_answer[np.isfinite(data.good_ratio_answer[:, 0])].astype(float)
    assert numbers["gate"]["tensor"] == "good_ratio_answer"
    for layer, found in enumerate(numbers["gate"]["layers"]):
        values = gates[:, layer]
        assert found["values"] == 199
        assert found["mean"] == pytest.approx(values.mean(), abs=1e-7)
        assert found["std"] == pytest.approx(values.std(), abs=1e-7)
        wanted = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95], method="inverted_cdf")
        assert np.allclose([found[key] for key in inspect_data.QUANTILES], wanted, atol=1 / inspect_data.BINS)
    probs = np.delete(data.router_probs, 7, axis=0).astype(float)
    assert np.allclose(numbers["use"]["mean"], probs.mean(0), atol=1e-7)
    assert numbers["use"]["dead"] == [[1, 2]]
    assert numbers["use"]["rare"] == [[2, 3]]
    rows = -(probs * np.log(probs)).sum(-1) / np.log(8)
    mean = probs.mean(0)
    for layer, found in enumerate(numbers["entropy"]):
        assert found["mean"] == pytest.approx(rows[:, layer].mean(), abs=1e-6)
        assert found["of_mean"] == pytest.approx(-(mean[layer] * np.log(mean[layer])).sum() / np.log(8), abs=1e-6)
    for name in ("answer", "legacy", "all", "nll", "ifd"):
        values = score(data, name)
        assert numbers["scores"][name]["values"] == int(np.isfinite(values).sum())
        assert numbers["scores"][name]["median"] == pytest.approx(np.nanmedian(values), abs=1e-6)


def test_numbers_of_a_source_are_those_of_its_rows(numbers: dict[str, Any], data: rd.RouterData) -> None:
    mine = np.array(data.dataset) == "d1"
    found = numbers["sources"]["d1"]
    assert found["rows"] == mine.sum()
    assert found["tokens"]["median"] == np.median(data.tokens[mine])
    assert found["truncated"] == pytest.approx(data.truncated[mine].mean())
    assert sum(one["without_answer"] for one in numbers["sources"].values()) == 1
    assert found["padding"] == pytest.approx(0.02)
    assert found["scores"]["all"]["mean"] == pytest.approx(np.nanmean(score(data, "all")[mine]), abs=1e-6)
    assert found["gate"][0]["mean"] == pytest.approx(np.nanmean(data.good_ratio_answer[mine, 0]), abs=1e-6)


def test_scores_are_compared_with_each_other_and_with_length(numbers: dict[str, Any], data: rd.RouterData) -> None:
    from scipy.stats import spearmanr

    scores = table(data)
    both = np.isfinite(scores["answer"]) & np.isfinite(scores["nll"])
    wanted = spearmanr(scores["answer"][both], scores["nll"][both]).statistic
    assert numbers["agreement"]["answer"]["nll"] == pytest.approx(wanted, abs=1e-4)
    assert numbers["agreement"]["nll"]["nll"] == pytest.approx(1)
    assert numbers["agreement"]["all"]["length"] == pytest.approx(
        spearmanr(scores["all"], data.tokens).statistic, abs=1e-4
    )


def test_work_names_the_slowest_pieces(numbers: dict[str, Any]) -> None:
    work = numbers["work"]
    assert work["plan"] == {"batches": 6, "tokens": 200, "padded_tokens": 204, "padding": pytest.approx(0.02)}
    assert (work["units"], work["seconds"]) == (6, 5.5)
    assert [(unit["dataset"], unit["seconds"]) for unit in work["slowest"][:3]] == [
        ("d0", 2.0),
        ("d1", 2.0),
        ("d0", 0.5),
    ]


def test_the_size_of_pieces_changes_nothing_and_the_same_data_give_the_same_bytes(
    output: Path, numbers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for n, size in enumerate((1, 1000, inspect_data.CHUNK_BYTES)):
        monkeypatch.setattr(inspect_data, "CHUNK_BYTES", size)
        found = look(output, tmp_path / str(n))
        assert _close(found, numbers)
        files.append({path.name: sha256_file(path) for path in (tmp_path / str(n)).iterdir() if path.suffix == ".png"})
    assert files[0] == files[1] == files[2]
    assert set(files[0]) == {f"{name}.png" for name in ("gates", "experts", "entropy", "lengths", "scores", "work")}
    assert all((tmp_path / "0" / name).read_bytes().startswith(PNG) for name in files[0])


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_close, a, b))
    return a == pytest.approx(b, rel=1e-9, abs=1e-12) if isinstance(a, float) else a == b


def test_every_kind_of_place(output: Path, data: rd.RouterData, numbers: dict[str, Any], tmp_path: Path) -> None:
    assert look(output / rd.FOLDER, tmp_path / "folder") == numbers
    one = look(output / rd.FOLDER / "d1", tmp_path / "one")
    assert one["sources"]["d1"] == numbers["sources"]["d1"]
    assert list(one["sources"]) == ["d1"]
    halves = [range(n, 200, 2) for n in (0, 1)]
    shards = [
        make_router_data(tmp_path / f"shard{n}", data.take(half), f"route-shard-{n}-of-2")
        for n, half in enumerate(halves)
    ]
    both = look(shards, tmp_path / "both")
    assert both["rows"] == 200
    assert _close(both["use"], numbers["use"])
    assert both["scores"] == numbers["scores"]
    assert look(shards[0], tmp_path / "half")["rows"] == 100
    with pytest.raises(UserError, match="is there twice"):
        look([output, output / rd.FOLDER], tmp_path / "twice")
    other = make_router_data(tmp_path / "other", router_data(20, layers=2))
    with pytest.raises(UserError, match="are of different judges"):
        look([output, other], tmp_path / "different")
    assert not (tmp_path / "different").exists()


def test_files_of_the_predecessor(output: Path, data: rd.RouterData, numbers: dict[str, Any], tmp_path: Path) -> None:
    sound = make_router_data(tmp_path / "route", data.take([i for i in range(200) if i != 7]))
    legacy.export_all(sound)
    folder = tmp_path / "old" / rd.FOLDER
    folder.mkdir(parents=True)
    for file in sound.glob(legacy.EXPORTED):
        file.rename(folder / file.name)
    found = look(tmp_path / "old", tmp_path / "out")
    assert found["gate"]["tensor"] == "quality_score"
    assert list(found["scores"]) == ["legacy"]
    assert found["sources"]["d0"]["tokens"] is found["sources"]["d0"]["truncated"] is None
    assert found["work"]["plan"] is None
    assert np.allclose(found["use"]["mean"], numbers["use"]["mean"], atol=1e-7)
    assert plotted(tmp_path / "out") == {"gates", "experts", "entropy", "scores"}
    assert look(folder / "d1_router_data.pt", tmp_path / "file")["rows"] == 100
    with pytest.raises(UserError, match="'d1' is there twice"):
        look([folder, folder / "d1_router_data.pt"], tmp_path / "twice")


def test_a_judge_without_gates_and_one_without_routers(data: rd.RouterData, tmp_path: Path) -> None:
    plain = data.take(range(200))
    for name in GATED:
        setattr(plain, name, np.zeros((200, 0), np.float32))
    found = look(make_router_data(tmp_path / "plain", plain), tmp_path / "a")
    assert found["gate"] is None
    assert list(found["scores"]) == ["nll", "ifd"]
    assert plotted(tmp_path / "a") == {"experts", "entropy", "lengths", "scores"}
    plain.router_probs = np.zeros((200, 0, 0), np.float32)
    plain.nll[:] = np.nan
    plain.embedding = np.ones((200, 5), np.float32)
    found = look(make_router_data(tmp_path / "dense", plain), tmp_path / "b")
    assert (found["embedding"], found["layers"], found["use"]) == (5, None, None)
    assert plotted(tmp_path / "b") == {"lengths"}
    assert "embeddings of 5 dimensions; scores: none" in inspect.inspect_tables.summary(found)


def test_as_it_is_typed(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{output / rd.FOLDER}/"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "200 rows of 2 sources; 3 layers of 8 experts; scores: answer, legacy, all, nll, ifd"
    assert said[-1] == str(output / "inspect")
    assert any(line.startswith("d1 ") for line in said)
    assert any("1 of 24 experts are dead, 1 rare" in line for line in said)
    assert any("padding 2.00% of them" in line for line in said)
    page = (output / "inspect" / "inspect.html").read_text()
    assert page.count('<img src="data:image/png;base64,') == 6
    assert not re.search(r"<script|https?://|url\(", page)
    read_manifest(output)  # the router data are still whole
    assert rd.locate(output / rd.FOLDER) == output
    assert main(["inspect", f"router_data_dir={output}"]) == 0  # found, said again
    assert capsys.readouterr().out.splitlines() == said


def test_places_and_keys(output: Path, tmp_path: Path) -> None:
    default = f"output_dir={output / 'inspect'}"
    name = f"router_data_dir=['{output}']"
    assert inspect.words([str(output), "threads=1"]) == [name, "threads=1", default]
    assert inspect.words([f"router_data_dir={output}"]) == [f"router_data_dir=[{output}]", default]
    assert inspect.words(["a b", "it's", "output_dir=o"]) == [r"router_data_dir=['a b','it\'s']", "output_dir=o"]
    assert inspect.words(["router_data_dir=[a,b]", "output_dir=o"]) == ["router_data_dir=[a,b]", "output_dir=o"]
    assert inspect.words([]) == []
    for words, said in (
        ([str(output), "router_data_dir=x"], "both name router data"),
        ([str(output / rd.FOLDER / "d0")], "output_dir= is missing"),
        (["router_data_dir=[a,b]"], "output_dir= is missing"),
        ([str(tmp_path / "nowhere")], "does not exist"),
    ):
        with pytest.raises(UserError, match=said):
            inspect.words(words)


@pytest.mark.parametrize(
    ("words", "said"), [((), "router_data_dir= is missing"), (("router_data_dir=[]",), "is empty")]
)
def test_nothing_to_look_at(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", *words, "output_dir=out"]) == 2
    assert said in capsys.readouterr().err


def test_damage_is_named(output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = make_router_data(tmp_path / "route", router_data(20))
    file = copy / rd.FOLDER / "d0" / "00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    assert main(["inspect", str(copy)]) == 2
    assert "router_data/d0/00000.safetensors" in capsys.readouterr().err
    assert not (copy / "inspect").exists()


def test_many_sources_and_layers_stay_small(tmp_path: Path) -> None:
    data = router_data(90, layers=40, experts=3)
    data.dataset = [f"source-{i % 45:02d}-" + "x" * 50 for i in range(90)]
    found = look(make_router_data(tmp_path / "route", data), tmp_path / "out")
    assert len(found["sources"]) == 45
    assert len(inspect_plots.largest(found)) == inspect_plots.PANELS
    assert "and 15 more" in inspect.inspect_tables.summary(found)
    assert max(path.stat().st_size for path in (tmp_path / "out").glob("*.png")) < 2**20
