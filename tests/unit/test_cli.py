"""pytest tests/unit/test_cli.py"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from selectmoe import cli
from selectmoe.errors import UserError
from selectmoe.run import parse_budget

ROW = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello there"}]}


def write_rows(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_help_names_every_stage(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in [*cli.STAGES, *cli.TOOLS])


def test_help_imports_nothing_heavy():
    code = "import sys; from selectmoe import cli; cli.main(['--help']); print([m for m in ('torch','hydra','numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize("stage", [name for name in (*cli.STAGES, *cli.TOOLS) if name != "sync"])
def test_stage_help_documents_every_key(stage, capsys):
    from selectmoe.config import leaves

    assert cli.main([stage, "--help"]) == 0
    text = capsys.readouterr().out
    for leaf in leaves(cli.config_class(stage)):
        assert f"  {leaf.name}\n" in text
        assert len(leaf.doc) > 3, leaf.name


def test_cfg_job_prints_and_does_nothing(tmp_path, capsys):
    words = ["ingest", "--cfg", "job", "data=x.jsonl", f"output_dir={tmp_path / 'o'}", "holdout=3"]
    assert cli.main(words) == 0
    assert "holdout: 3" in capsys.readouterr().out
    assert not (tmp_path / "o").exists()


def test_a_stage_runs_and_its_last_line_is_the_path(tmp_path, capsys):
    rows = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]}
        for n in range(20)
    ]
    out = tmp_path / "o"
    assert cli.main(["ingest", f"data={write_rows(tmp_path / 'rows.jsonl', rows)}", f"output_dir={out}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    assert (out / "manifest.json").is_file()
    assert "rows.jsonl" in (out / ".hydra" / "config.yaml").read_text()


BAD = [
    (["select", "nonsense=1"], ["nonsense", "nearest known"]),
    (["selekt"], ["selekt", "select"]),
    (["select", "router_data_dir"], ["key=value"]),
    (["select", "router_data_dir=r", "data=d", "output_dir=OUT", "selection_percentage=0"], ["selection_percentage=0"]),
    (["select", "router_data_dir=r", "data=d", "output_dir=OUT", "selection_percentage=1.5"], ["1.5"]),
    (["select", "router_data_dir=r", "data=d", "output_dir=OUT", "selection_percentage=many"], ["many"]),
    (["ingest", "data=absent.jsonl", "output_dir=OUT"], ["absent.jsonl", "does not exist"]),
    (["ingest", "data=EMPTY", "output_dir=OUT"], ["empty"]),
    (["ingest", "data=NOT_JSON", "output_dir=OUT"], ["not_json.jsonl"]),
    (["ingest", "data=NO_MESSAGES", "output_dir=OUT"], ["3 of 100"]),
    (["ingest", "data=GOOD"], ["output_dir="]),
    (["convert", "source_model=DENSE", "output_dir=OUT"], ["llama", "olmoe"]),
    (["convert", "source_model=absent/folder/x", "output_dir=OUT"], ["absent/folder/x"]),
    (["ingest", "data=GOOD", "output_dir=TAKEN"], ["mine.txt"]),
    (["ingest", "data=GOOD", "output_dir=OUT", "work_root=s3://key:pw@bucket/x"], ["credential"]),
    (["run", "data=GOOD", "output_dir=OUT", "judge=upcycle"], ["source_model="]),
    (["run", "data=GOOD", "output_dir=OUT", "budget=1.5"], ["budget=1.5"]),
    (["run", "data=GOOD", "output_dir=OUT", "seeds=1"], ["seeds=1"]),
    (["run", "data=GOOD", "output_dir=OUT", "source_model=DENSE"], ["llama"]),
    (["run", "preset=quik", "output_dir=OUT"], ["quik"]),
    (["run", "data=GOOD", "output_dir=OUT", "select.selection_percentage=0.5"], ["select.selection_percentage"]),
]


@pytest.mark.parametrize(("words", "named"), BAD, ids=[" ".join(words)[:60] for words, _ in BAD])
def test_bad_input_is_one_line_exit_2_and_leaves_nothing(words, named, tmp_path, capsys):
    places = {
        "OUT": str(tmp_path / "out"),
        "TAKEN": str(tmp_path / "taken"),
        "EMPTY": write_rows(tmp_path / "empty.jsonl", []),
        "NOT_JSON": str(tmp_path / "not_json.jsonl"),
        "NO_MESSAGES": write_rows(tmp_path / "few.jsonl", [ROW] * 97 + [{"x": 1}] * 3),
        "GOOD": write_rows(tmp_path / "good.jsonl", [{**ROW, "id": str(n)} for n in range(20)]),
        "DENSE": str(tmp_path / "dense"),
    }
    (tmp_path / "not_json.jsonl").write_text("this is\nno JSON\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("precious")
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text('{"model_type": "llama"}')
    filled = []
    for word in words:
        key, sign, value = word.partition("=")
        filled.append(key + sign + places.get(value, value))
    assert cli.main(filled) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("selectmoe: ")
    assert all(name in error for name in named), error
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "taken" / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("budget", "keys"),
    [
        ("0.05", {"selection_percentage": 0.05}),
        ("1.0", {"selection_percentage": 1.0}),
        ("100", {"selection_rows": 100}),
        ("50000t", {"selection_tokens": 50000}),
    ],
)
def test_a_budget_is_a_share_rows_or_tokens(budget, keys):
    assert parse_budget(budget) == keys


@pytest.mark.parametrize("budget", ["0", "0.0", "1.5", "-3", "nan", "inf", "t", "many", "0t"])
def test_bad_budgets_are_refused(budget):
    with pytest.raises(UserError, match="budget="):
        parse_budget(budget)


def test_a_path_is_taken_as_it_is_typed():
    config = cli.compose("ingest", ["data=my rows (1), it's {new}.jsonl", "output_dir=o=1"])
    assert config.data == "my rows (1), it's {new}.jsonl"
    assert config.output_dir == "o=1"
    assert cli.compose("ingest", ["data='a b'", "output_dir=o"]).data == "a b"


def test_no_key_of_ours_looks_like_a_credential():
    from selectmoe.config import leaves

    for name in [*cli.STAGES, "demo"]:
        cli.refuse_credentials([f"{leaf.name}=rows@v2/x" for leaf in leaves(cli.config_class(name))])


@pytest.mark.parametrize(
    "word", ["hf_token=x", "data=https://me:pw@host/x", "s3://me:pw@host", "data=s3://b/x?X-Amz-Signature=1"]
)
def test_a_credential_is_refused_and_not_repeated(word):
    with pytest.raises(UserError, match="looks like a credential") as caught:
        cli.refuse_credentials([word])
    assert "pw" not in str(caught.value)


def test_an_internal_failure_shows_a_trace_and_ends_with_its_stage_and_log(tmp_path, capsys, monkeypatch):
    from selectmoe import ingest

    monkeypatch.setattr(ingest, "find_datasets", lambda config: {}["missing"])
    out = tmp_path / "o"
    assert cli.main(["ingest", f"data={write_rows(tmp_path / 'rows.jsonl', [ROW])}", f"output_dir={out}"]) == 1
    said = capsys.readouterr().err
    log = out / "logs" / "ingest.log"
    assert said.startswith("Traceback")
    assert said.splitlines()[-1] == f"selectmoe: failed (stage ingest; log {log}): KeyError: 'missing'"
    assert "KeyError" in log.read_text()
