"""Stage evaluate: .venv/bin/python -m pytest tests/unit/test_evaluate.py"""

import json
import subprocess
import sys

import pytest
from test_finetune import config as finetune_config
from test_finetune import rows, save_rows, save_target

from selectmoe import evaluate, finetune, stage
from selectmoe.config import StageConfig, load
from selectmoe.errors import UserError
from selectmoe.evaluate import Result
from selectmoe.manifest import read_manifest
from selectmoe.pool import Row, write_pool


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def holdout(tmp_path_factory):
    out = tmp_path_factory.mktemp("ingest") / "out"
    other = [Row("other", f"o-{r.id}", r.messages) for r in rows(4, factor=2)]
    with stage.begin("ingest", 1, StageConfig(output_dir=str(out))) as output:
        write_pool(output.staging / "holdout", [*rows(6), *other])
        output.part("holdout", rows_in=10, rows_out=10)
        output.commit(rows_in=10, rows_out=10)
    return out


@pytest.fixture(scope="module")
def adapter(target, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapter")
    training = {"epochs": 8, "learning_rate": 0.05, "layers": 1}
    return finetune.run(finetune_config(target, save_rows(root / "s", rows(10)), root / "a", training=training))


def config(target, output, **more):
    return load(
        evaluate.EvaluateConfig, {"threads": 1, "max_length": 256} | more, model=str(target), output_dir=str(output)
    )


def test_bits_per_byte_before_and_after(target, holdout, adapter, tmp_path):
    given = {"holdout": str(holdout), "layers": 1}
    base = evaluate.run(config(target, tmp_path / "base", arm="base", seed=0, **given))
    tuned = evaluate.run(config(target, tmp_path / "tuned", arm="selected", seed=1, adapters=[str(adapter)], **given))
    before, after = (json.loads((x / evaluate.SUMMARY).read_text()) for x in (base, tuned))
    assert (after["arm"], after["seed"]) == ("selected", 1)
    assert after["tasks"]["holdout"]["value"] < before["tasks"]["holdout"]["value"] - 0.2
    results = evaluate.read_results(tuned)
    assert [(r.dataset, r.id) for r in results] == sorted((r.dataset, r.id) for r in results)
    per = {d: [r for r in results if r.dataset == d] for d in ("toy", "other")}
    macro = sum(sum(r.value for r in part) / sum(r.weight for r in part) for part in per.values()) / 2
    assert after["tasks"]["holdout"]["value"] == pytest.approx(macro)
    found = read_manifest(tuned)
    assert found.rows == {"in": 10, "out": 10, "dropped": {}}
    assert set(found.inputs) == {"model", "adapters", "holdout"}
    inner = config(target, tmp_path / "again", arm="selected", seed=1, **given | {"holdout": f"{holdout}/holdout"})
    inner.adapters = [str(adapter)]
    assert read_manifest(evaluate.run(inner)).identity == found.identity


def test_an_adapter_of_another_depth_is_refused(target, holdout, adapter, tmp_path):
    with pytest.raises(UserError, match="number of layers"):
        evaluate.run(config(target, tmp_path / "x", adapters=[str(adapter)], holdout=str(holdout)))
    with pytest.raises(UserError, match=r"holds no adapter_model\.safetensors"):
        evaluate.run(config(target, tmp_path / "y", adapters=[str(holdout)], holdout=str(holdout)))
    assert not any(tmp_path.iterdir())


def test_spec7_46_local_tasks_through_lm_eval(target, tmp_path):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    lines = [json.dumps({"q": f"word {i}", "a": i % 2}) for i in range(6)]
    (tasks / "data.jsonl").write_text("\n".join(lines))
    (tasks / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files: {test: " + str(tasks / "data.jsonl") + "}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: a\n"
        "doc_to_choice: ['no', 'yes']\nmetric_list:\n  - metric: acc\n"
    )
    given = {"tasks": ["mine"], "include_path": str(tasks), "limit": 4}
    out = evaluate.run(config(target, tmp_path / "out", **given))
    results = evaluate.read_results(out)
    assert [(r.task, r.dataset, r.id, r.weight) for r in results] == [("mine", "mine", str(i), 1.0) for i in range(4)]
    entry = json.loads((out / evaluate.SUMMARY).read_text())["tasks"]["mine"]
    raw = json.loads((out / "lm_eval/results.json").read_text())
    assert entry["metric"] == "acc"
    assert entry["value"] == pytest.approx(raw["results"]["mine"]["acc,none"])
    assert (out / "lm_eval/samples_mine.jsonl").is_file()
    assert all(not f["result"] for f in read_manifest(out).files if f["path"].startswith("lm_eval/"))


@pytest.mark.parametrize(
    "wrong", [{"limit": -1}, {"batch_size": 0}, {"max_length": 1}, {"arm": ""}, {"tasks": []}, {"adapters": ["a", "b"]}]
)
def test_values_out_of_range(target, tmp_path, wrong):
    with pytest.raises(UserError):
        config(target, tmp_path, **wrong)


def test_first_filter_and_first_metric_count():
    samples = [
        {"doc_id": 0, "filter": f, "metrics": ["exact_match"], "exact_match": v}
        for f, v in (("strict", 1.0), ("loose", 0.0))
    ]
    assert evaluate.examples_of("t", samples) == ("exact_match", [Result("t", "t", "0", 1.0, 1.0)])
    with pytest.raises(UserError, match="no number per example"):
        evaluate.examples_of("t", [{"doc_id": 0, "metrics": ["word_perplexity"], "word_perplexity": (1.0, 2)}])


def test_heavy_libraries_are_imported_late():
    code = (
        "import sys, selectmoe.finetune, selectmoe.evaluate, selectmoe.verdict;"
        "print([m for m in ('torch', 'transformers', 'peft', 'lm_eval') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
