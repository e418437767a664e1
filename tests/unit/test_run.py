"""The chain in one process, on the tiny preset: pytest tests/unit/test_run.py"""

import json

import pytest

from selectmoe import check, cli, run
from selectmoe.config import leaves
from selectmoe.errors import UserError
from selectmoe.manifest import find_manifests, read_manifest
from selectmoe.warmup import RECIPES


@pytest.fixture(scope="module")
def finished(chain):
    """The output of `selectmoe run preset=tiny shards=2 threads=1` (conftest.py)."""
    return chain.output


def test_it_ends_with_a_verdict(finished):
    verdict = json.loads((finished / "report" / "verdict.json").read_text())
    assert verdict["verdict"] in ("beats_random", "no_evidence", "worse_than_random")
    assert {arm["name"] for arm in verdict["arms"]} == {"selected", "oracle"}
    page = (finished / "report" / "report.html").read_text()
    results = json.loads((finished / "report" / "results.json").read_text())
    assert results["sentence"].split(":")[0] in page
    assert "http://" not in page
    assert "<script" not in page


def test_every_hand_off_keeps_its_rows(finished):
    for path, manifest in find_manifests(finished):
        rows = manifest.rows
        assert rows["in"] == rows["out"] + sum(rows["dropped"].values()), path


def test_a_second_run_elsewhere_gives_the_same_bytes(finished, chain, tmp_path):
    """Another folder, one shard, two threads: the same identities from end to end."""
    run.run(run.compose([*chain.settings, f"output_dir={tmp_path}", "shards=1", "threads=2"]))
    one, two = (side / "select" / "selected_data.jsonl" for side in (finished, tmp_path))
    assert one.read_bytes() == two.read_bytes()
    for stage in ("merge", "select", "baseline", "finetune/selected-0", "evaluate/random-2", "report"):
        assert read_manifest(finished / stage).identity == read_manifest(tmp_path / stage).identity, stage


def test_a_plan_resolves_every_stage(chain, tmp_path):
    config = run.compose([*chain.settings, f"output_dir={tmp_path / 'c'}"])
    plan = check.plan(config)
    assert set(plan.stages) == set(run.CONFIGS)
    assert plan.arm_seeds[0] == "selected:0"
    assert len(plan.arm_seeds) == 9
    assert "output_dir" not in plan.stages["select"]
    json.dumps(plan.stages)


def test_own_rows_are_not_planted_into(chain, tmp_path):
    rows = chain.demo / "tiny" / "data"
    (tmp_path / "mine").mkdir()
    for folder in sorted(rows.iterdir()):
        (tmp_path / "mine" / f"{folder.name}.jsonl").write_bytes((folder / "rows.jsonl").read_bytes())
    plan = check.plan(run.compose([*chain.settings, f"data={tmp_path / 'mine'}", f"output_dir={tmp_path / 'o'}"]))
    assert plan.stages["ingest"]["plant"]["share"] == 0
    assert plan.arms == ["selected", "random"]


@pytest.mark.parametrize("preset", ["quick", "full", "tiny"])
def test_every_preset_that_ships_is_valid(preset, tmp_path):
    config = cli.compose("run", [f"preset={preset}", f"output_dir={tmp_path / 'o'}"])
    assert check.stage_configs(config)
    assert config.finetune.training.layers == config.evaluate.layers


@pytest.mark.parametrize(("recipe", "mode"), [("legacy", "observer"), ("observer", "applied")])
def test_a_recipe_and_a_gate_mode_that_do_not_fit_are_refused_before_anything_runs(recipe, mode, tmp_path):
    words = ["preset=tiny", f"output_dir={tmp_path / 'o'}", f"warmup.recipe={recipe}"]
    with pytest.raises(UserError, match=rf"warmup\.recipe={recipe} does not fit convert\.model\.gate_mode={mode}"):
        check.stage_configs(cli.compose("run", [*words, f"convert.model.gate_mode={mode}"]))
    fits = cli.compose("run", [*words, f"convert.model.gate_mode={RECIPES[recipe][0]}"])
    assert check.stage_configs(fits)["warmup"]["recipe"] == recipe


@pytest.mark.parametrize("stage", ["warmup", "finetune"])
def test_a_run_is_one_process(stage, tmp_path):
    with pytest.raises(UserError, match=rf"{stage}\.training\.distributed is set by the run itself"):
        cli.compose("run", [f"{stage}.training.distributed=ddp", "preset=tiny", f"output_dir={tmp_path / 'o'}"])


def test_every_key_of_a_run_has_a_meaning():
    assert all(leaf.doc for leaf in leaves(run.RunConfig))
