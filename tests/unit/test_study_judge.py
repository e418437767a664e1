"""The study of gate losses: its statistics, its grid, its rows, and that its shortcut gives the product's own scores."""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.judge import applied, design, features, foreign, gates, page, pools, statistics
from bench.judge.design import Cell, Design
from bench.judge.findings import Evaluation, choose
from selectmoe import corruption, template
from selectmoe.convert import GateOptions
from selectmoe.losses import LOSSES
from selectmoe.modeling import SelectMoeConfig, load_judge
from selectmoe.pool import Row, content_id, locate, read_pool
from selectmoe.router_data import RouterData
from selectmoe.scores import auc
from selectmoe.select import SelectConfig
from selectmoe.selection import Arm
from selectmoe.warmup import RECIPES, WarmupConfig

ROOT = Path(__file__).parents[2]
KINDS = ["", "", "", "", "swapped", "swapped", "truncated", "truncated", "truncated"]
VALUES = [0.9, 0.8, 0.4, 0.4, 0.4, 0.3, 0.95, 0.1, 0.2]


def test_point_estimate_is_the_auc_of_each_kind():
    draws = statistics.draw(KINDS, 20)
    found = statistics.aucs(VALUES, draws)
    values = np.array(VALUES)
    for kind in ("swapped", "truncated"):
        assert found[kind][0] == pytest.approx(auc(values[:4], values[np.array(KINDS) == kind]))
    assert statistics.macro(found)[0] == pytest.approx((found["swapped"][0] + found["truncated"][0]) / 2)


def test_replicates_are_aucs_of_resampled_rows():
    draws, values = statistics.draw(KINDS, 20), np.array(VALUES)
    found = statistics.aucs(values, draws)
    for n in (1, 7, 20):
        good = np.repeat(values[draws.good], draws.good_counts[n].astype(int))
        bad = np.repeat(values[draws.bad["truncated"]], draws.bad_counts["truncated"][n].astype(int))
        assert found["truncated"][n] == pytest.approx(auc(good, bad))


def test_row_without_a_score_ranks_last():
    draws = statistics.draw(["", "swapped"], 2)
    assert statistics.aucs([0.1, np.nan], draws)["swapped"][0] == 1
    assert statistics.aucs([np.nan, 0.1], draws)["swapped"][0] == 0


def test_negated_score_has_the_other_auc():
    draws = statistics.draw(KINDS, 50)
    there, back = (statistics.macro(statistics.aucs(sign * np.array(VALUES), draws)) for sign in (1, -1))
    assert there + back == pytest.approx(np.ones(51))


def test_seeds_are_resampled_and_the_estimate_is_their_mean():
    rng = np.random.default_rng(0)
    seeds = [np.full(2001, mean) + rng.normal(0, 0.01, 2001) for mean in (0.5, 0.6, 0.9)]
    whole = statistics.over_seeds(seeds)
    assert whole[0] == pytest.approx(np.mean([s[0] for s in seeds]))
    found = statistics.summary(whole)
    assert found["low"] < 0.56
    assert found["high"] > 0.79
    one = statistics.summary(statistics.over_seeds(seeds[:1]))
    assert one["high"] - one["low"] < 0.05


def test_interval_covers_the_truth_as_often_as_it_says():
    rng, hits = np.random.default_rng(1), 0
    kinds = [""] * 60 + ["a"] * 40 + ["b"] * 40
    truth = 0.7602  # P(N(1, 1) > N(0, 1))
    for n in range(100):
        values = np.concatenate([rng.normal(1, 1, 60), rng.normal(0, 1, 80)])
        found = statistics.summary(statistics.macro(statistics.aucs(values, statistics.draw(kinds, 200, n))))
        hits += found["low"] <= truth <= found["high"]
    assert hits >= 88


def test_labels_at_random_are_a_coin():
    values = np.random.default_rng(0).normal(size=80)
    found = statistics.pseudo_planted(values, np.arange(80), 0.5, 300)
    assert found.mean() == pytest.approx(0.5, abs=0.02)
    assert found.std() > 0.03  # single ones scatter


def test_grid_has_every_loss_mode_bias_and_seed():
    d = Design()
    cells = [*design.observer_cells(d), *design.applied_cells(d), *design.untrained_cells(d, "A")]
    assert len({cell.name for cell in cells}) == len(set(cells))
    for mode in ("observer", "applied"):
        for loss in (*LOSSES, "none"):
            for bias in (0.0, 3.0):
                seeds = {c.seed for c in cells if (c.mode, c.loss, c.bias) == (mode, loss, bias)}
                assert len(seeds) >= (20 if (mode, loss) == ("observer", "none") else 3)
    assert len(d.kinds) >= 6
    assert not {*d.names("A")} & {*d.names("B")}


@pytest.mark.parametrize("mode", ["observer", "applied"])
def test_contrastive_is_judged_on_every_kind_without_it(mode):
    d = Design()
    cells = design.observer_cells(d) if mode == "observer" else design.applied_cells(d)
    for seed in range(3):
        left = [c.left_out for c in cells if c.loss == "contrastive" and c.left_out and c.seed == seed and c.bias == 3]
        assert {kind for kinds in left for kind in kinds} == {*d.kinds}


def rows(start: int, number: int) -> list[Row]:
    out = []
    for n in range(start, start + number):
        words = random.Random(n).sample(["river", "stone", "copper", "garden", "engine", "paper", "winter", "lamp"], 5)
        messages = [
            {"role": "user", "content": f"{words[0]} {n}"},
            {"role": "assistant", "content": " ".join(words[1:])},
        ]
        out.append(Row("d", content_id("d", messages), messages))
    return out


def test_other_language_keeps_the_question_and_about_the_length():
    row = rows(0, 1)[0]
    one, other = (foreign.other_language(row, row, random.Random(seed)) for seed in (1, 2))
    assert one == foreign.other_language(row, row, random.Random(1))
    assert one.messages[0] == row.messages[0]
    assert one.id != row.id != other.id != one.id
    assert len(one.answers[0]) == pytest.approx(max(20, len(row.answers[0])), abs=2)
    assert any(one.answers[0][:10] in reply for name in foreign.LANGUAGES for reply in foreign.replies(name))


@pytest.fixture
def small(monkeypatch):
    """A design over one made-up source, and its pool."""
    monkeypatch.setattr(pools, "originals", lambda d, pool: rows(0, d.clean + 2 * d.planted + d.warm + d.spoiled))
    d = dataclasses.replace(design.smoke(), clean=10, planted=4, warm=8)
    return d, pools.make_pool(d, "A")


def test_scored_rows_are_in_no_warm_up(small):
    d, pool = small
    assert [len(pool.clean), len(pool.planted), len(pool.warm), len(pool.spoiled)] == [10, 8, 8, d.spoiled]
    scored = {row.key for row in pool.scored}
    assert len(scored) == 18
    for cell in design.observer_cells(d):
        if not cell.unseen:
            assert not scored & {row.key for step in pools.steps(d, pool, cell) for row, _ in step}
    questions = {row.messages[0]["content"] for row in pool.scored}
    assert not questions & {row.messages[0]["content"] for row in [*pool.warm, *pool.spoiled]}
    assert sorted(pool.kinds.values()) == sorted([*d.kinds] * 4)


def test_steps_leave_out_kinds_sources_and_clean_rows(small):
    d, pool = small
    cell = Cell("A", "observer", "contrastive", 0.0, 1, "clean", 8, 0.1, left_out=(foreign.NAME,))
    used = {pool.bank[key].key: key[1] for key in pool.bank}
    steps = pools.steps(d, pool, cell)
    assert {used[row.key] for step in steps for row, label in step if not label} == {"shuffled"}
    assert all([label for _, label in step].count(1) == [label for _, label in step].count(0) for step in steps)
    assert pools.steps(d, pool, dataclasses.replace(cell, loss="sigmoid"))[0][0][1] == 1
    contaminated = pool.warm_rows("contaminated", 8, d.share)
    assert len({row.key for row in contaminated} & {row.key for row in pool.spoiled}) == d.spoiled
    assert pool.warm_rows("clean", 8, d.share, unseen="d") == []
    permuted = pools.steps(d, pool, dataclasses.replace(cell, permuted=True))
    assert [row for step in permuted for row, _ in step] == [row for step in steps for row, _ in step]
    assert permuted != steps


def upper(row, donor, rng):
    """A corruption without chance, so that the product's own copies are known."""
    messages = [{**m, "content": m["content"].upper()} if m["role"] == "assistant" else m for m in row.messages]
    return Row(row.dataset, content_id(row.dataset, messages), messages)


@pytest.mark.parametrize(("loss", "rate"), [("contrastive", 3e-2), ("sigmoid", 3e-2), ("entropy", 3e-2)])
def test_features_give_the_scores_of_warmup_and_route(loss, rate, small_pool, small_judge, tmp_path, monkeypatch):
    monkeypatch.setitem(corruption.CORRUPTIONS, "upper", upper)
    judge = small_judge("observer")
    pool_rows = read_pool(locate(small_pool))
    size = len(pool_rows)
    d = dataclasses.replace(design.smoke(), batch=size, epochs=3, kinds=("upper",), max_length=64)
    cell = Cell("A", "observer", loss, 3.0, 3, "clean", size, rate)
    data = pools.publish(pool_rows, tmp_path / "rows")
    weights = applied.warm_up(d, cell, judge, data, tmp_path / "warmup")
    data = applied.route_pool(d, judge, str(weights), data, tmp_path / "route", rivals=False)

    copies = [upper(row, row, None) for row in pool_rows]
    tokenizer, model = template.load_tokenizer(judge), load_judge(judge, "cpu", torch.float32)
    for name, part in (("rows", pool_rows), ("copies", copies)):
        features.read(tmp_path / "f" / name, model, tokenizer, part, 64, 512, name == "copies")
    found = features.Features([tmp_path / "f" / "rows", tmp_path / "f" / "copies"])
    study = pools.StudyPool(
        [], [], pool_rows, [], {(r.key, "upper"): c for r, c in zip(pool_rows, copies, strict=True)}
    )
    steps = [[(row.key, label) for row, label in step] for step in pools.steps(d, study, cell)]
    start = gates.initial(2, 32, 3.0, 42)  # bias and seed with which the checkpoint was converted
    trained = gates.train(found, steps, cell.loss, start, cell.rate)
    assert (trained.weight - start.weight).abs().max() > 0.01
    before, after, opposite = gates.pooled(found, [start, trained, trained.negated()], data.keys)
    for name in gates.ARRAYS:
        assert after[name] == pytest.approx(getattr(data, name), abs=1e-5)
        assert np.abs(before[name] - after[name]).max() > 1e-3
    assert opposite["quality_score"] == pytest.approx(-after["quality_score"], abs=1e-5)


def test_part_without_its_index_is_read_again(small_judge, tmp_path):
    judge = small_judge("observer")
    tokenizer, model = template.load_tokenizer(judge), load_judge(judge, "cpu", torch.float32)
    some = rows(0, 12)
    features.read(tmp_path / "f", model, tokenizer, some, 64, 64, False)
    indices = sorted((tmp_path / "f").glob("*.json"))
    assert len(indices) > 2
    whole = indices[0].with_suffix(".npy").read_bytes()
    indices[0].unlink()
    indices[0].with_suffix(".npy").write_bytes(b"torn")
    times = {path: path.stat().st_mtime_ns for path in indices[1:]}
    features.read(tmp_path / "f", model, tokenizer, some, 64, 64, False)
    assert indices[0].with_suffix(".npy").read_bytes() == whole
    assert times == {path: path.stat().st_mtime_ns for path in indices[1:]}
    assert {key for part in features.Features([tmp_path / "f"]).parts for key in part.keys} == {r.key for r in some}


def evaluation(values: np.ndarray) -> tuple[Evaluation, dict[str, np.ndarray]]:
    n = len(KINDS)
    ratio = np.asarray(values, np.float32)[:, None]
    data = RouterData(
        dataset=["d"] * n,
        id=[f"r{i}" for i in range(n)],
        tokens=np.arange(n),
        answer_tokens=np.ones(n, int),
        truncated=np.zeros(n, bool),
        nll=np.linspace(1, 2, n),
        nll_unconditional=np.full(n, 3.0),
        answer_bytes=np.ones(n, int),
        router_probs=np.full((n, 1, 2), 0.5, np.float32),
        **dict.fromkeys(gates.ARRAYS, ratio),
    )
    return Evaluation(data, KINDS, 50), dict.fromkeys(gates.ARRAYS, ratio)


def test_a_kind_is_judged_by_the_gates_that_did_not_see_it():
    where, good = evaluation(np.array(VALUES))
    bad = {name: 1 - values for name, values in good.items()}
    cells = [Cell("A", "observer", "contrastive", 0.0, 0, left_out=(kind,)) for kind in ("swapped", "truncated")]
    group = where.group(cells, lambda cell: good if cell.left_out == ("swapped",) else bad)
    kinds = group["scores"]["answer"]["kinds"]
    assert kinds["swapped"]["value"] == pytest.approx(statistics.aucs(VALUES, where.draws)["swapped"][0])
    assert kinds["truncated"]["value"] == pytest.approx(1 - statistics.aucs(VALUES, where.draws)["truncated"][0])
    assert group["seeds"] == 1


def test_trained_gates_are_compared_with_the_best_untrained_ones():
    where, good = evaluation(np.array(VALUES))
    bad = {name: 1 - values for name, values in good.items()}
    where.set_untrained([bad, good, bad])
    same = where.group([Cell("A", "observer", "mse", 0.0, 0)], lambda cell: good)["scores"]["answer"]
    assert same["minus_untrained"] == {"value": 0, "low": 0, "high": 0}
    assert where.rival_table()["nll"]["minus_nll"]["value"] == 0


def test_choice_is_the_largest_gain_over_perplexity_on_average():
    d = Design()

    def group(loss: str, warm: str, gain: float, rate: float = d.rate) -> dict:
        cell = Cell("A", "observer", loss, 0.0, 0, warm, d.warm, rate)
        scores = {name: {"minus_nll": {"value": gain - 0.1 * n}} for n, name in enumerate(("answer", "all", "legacy"))}
        return {"cell": dataclasses.asdict(cell), "scores": scores}

    groups = [group("mse", "clean", 0.3), group("mse", "contaminated", -0.3), group("entropy", "clean", 0.1)]
    groups += [
        group("sigmoid", "clean", 0.9, rate=1.0),
        group("contrastive", "clean", 0.8),
    ]  # not in the grid; kinds seen
    chosen = choose(groups, d)
    assert (chosen["cell"]["loss"], chosen["score"]) == ("entropy", "answer")


def test_what_the_study_chose_is_what_the_commands_do_by_default():
    chosen = json.loads((ROOT / "docs/experiments/judge.json").read_text())["chosen"]
    cell, added, warmup = chosen["cell"], GateOptions(), WarmupConfig()
    assert (added.gate_mode, added.quality_gate_init_bias) == (cell["mode"], cell["bias"])
    assert SelectMoeConfig().quality_gate_init_bias == cell["bias"]
    assert RECIPES[warmup.recipe] == (cell["mode"], cell["loss"])
    assert (warmup.loss, warmup.training.quality_loss_weight) == (cell["loss"], cell["weight"])
    assert SelectConfig().score == Arm("", "").score == chosen["score"]


def test_the_page_is_what_the_results_say():
    folder = ROOT / "docs/experiments"
    said = "\n".join(page.lines(json.loads((folder / page.RESULTS).read_text()))) + "\n"
    assert said == (folder / page.PAGE).read_text(), "stale: python -m bench.study_judge"


def test_page_says_which_way_an_interval_points():
    assert page.beats({"low": 0.1, "high": 0.2}) == "beats it"
    assert page.beats({"low": -0.2, "high": -0.1}) == "loses to it"
    assert page.beats({"low": -0.2, "high": 0.1}) == "cannot be told from it"
    assert json.dumps(statistics.rounded({"a": [0.123456, 1]})) == '{"a": [0.1235, 1]}'
