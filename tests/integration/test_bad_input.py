"""What users get wrong, through the real commands: exit code 2, one line (what, where, what would be right), nothing left.

pytest tests/integration/test_bad_input.py
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipelines import servers

ROOT = Path(__file__).resolve().parent.parent.parent
STAGE = ("-m", "selectmoe")
RUN = ("-m", "selectmoe", "run", "output_dir={out}")
MAKE_RUN = ("-m", "pipelines.local", "run")
BUDGET = "must be a share above 0 and at most 1 (0.05), rows (100) or answer tokens (50000t)"
SHARE = "must be above 0 and at most 1 (0.05 is five per cent)"
KEYS = "the environment only (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_PASSWORD, HF_TOKEN)"
WRONG_SECRET = (
    "s3://select-moe/work/.probe: the S3 server refuses the credentials (SignatureDoesNotMatch): "
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to those of this server"
)
NO_BUCKET = (
    "s3://no-such-bucket/work/.probe: there is no bucket no-such-bucket (NoSuchBucket): create it, or name another"
)
OLMOE = "has model_type 'llama', expected olmoe; give an OLMoE checkpoint, or judge=upcycle for a Llama-like one"
UNREADABLE = "no known format has the keys ['x']; known: messages, sharegpt, alpaca, dolly, prompt/completion"
FEW = "; ".join(f"few/few.jsonl line {n}: {UNREADABLE}" for n in (98, 99, 100))


@dataclass(frozen=True)
class Case:
    """A command and the one line that it must say; `{...}` is filled in from the fixture `places`."""

    words: tuple[str, ...]
    says: str
    environment: Mapping[str, str] = field(default_factory=dict)


def both(words: str, says: str, **environment: str) -> list[Case]:
    """The same mistake in `selectmoe run` and in what `make run` calls."""
    return [Case((*command, *words.split()), says, environment) for command in (RUN, MAKE_RUN)]


def stage(words: str, says: str, **environment: str) -> Case:
    """A mistake in the command of a single stage."""
    return Case((*STAGE, *words.split()), says, environment)


SELECT = "select router_data_dir={out} data={good} output_dir={out}"
INGEST = "ingest data={good} output_dir={out}"
WARMUP = "warmup selector_model.path={judge} data={other} output_dir={out}"
LEGACY = "warmup recipe=legacy selector_model.path={applied} data={other} output_dir={out}"
LOSSES = "sigmoid, mse, beta_moment_matching, mean_variance_regularization, entropy, contrastive"
CASES = [
    # an unknown key
    *both(
        "preset=tiny ingest.holdot=3",
        "unknown key 'ingest.holdot'; nearest known: ingest.holdout, ingest.data, ingest.work_root (--help lists all)",
    ),
    stage(SELECT + " methd=top", "unknown key 'methd'; nearest known: method, threads (--help lists all)"),
    *both("preset=quik", "preset=quik is unknown; known: full, none, quick, tiny"),
    # shares and budgets
    stage(SELECT + " selection_percentage=0", f"selection_percentage=0.0 {SHARE}"),
    stage(SELECT + " selection_percentage=1.5", f"selection_percentage=1.5 {SHARE}"),
    *both("preset=tiny budget=0", f"budget=0 {BUDGET}"),
    *both("preset=tiny budget=1.5", f"budget=1.5 {BUDGET}"),
    *both(
        "preset=tiny data={good} budget=1000",
        "budget=1000 is 1000 rows, but the pool has 24 (40 read, 16 held out), of which picking leaves 17 "
        "(filter.drop=0.3): take a smaller budget or more rows",
    ),
    Case(
        (*MAKE_RUN, "preset=tiny", "budget=5000"),
        "budget=5000 is 5000 rows, but the pool has 98 (80 read, 16 held out), of which picking leaves 69 "
        "(filter.drop=0.3): take a smaller budget or more rows",
    ),
    # rows
    *both("preset=tiny data={missing}", "data={missing} does not exist: name a file of rows, or a folder of datasets"),
    stage(
        "ingest data={missing} output_dir={out}",
        "data={missing} does not exist: name a file of rows, or a folder of datasets",
    ),
    *both(
        "preset=tiny data={not_json}",
        "{not_json} is not JSON: none of its 2 lines can be read "
        "(the first: not JSON (Expecting value: line 1 column 1 (char 0)))",
    ),
    *both(
        "preset=tiny data={empty}",
        "{empty}: the pool is empty: no file holds a row, expected one JSON object a line",
    ),
    *both("preset=tiny data={few}", "{few}: 3 of 100 rows cannot be used (max_rejected=0.01 allows 1): " + FEW),
    # models
    *both(
        "preset=none data={good} budget=8 finetune.training.batch_size=4 source_model={llama}",
        "source_model={llama} " + OLMOE,
    ),
    stage(
        "convert source_model={llama} output_dir={out}",
        "source_model={llama} has model_type 'llama', expected olmoe; only OLMoE models can be converted",
    ),
    *both(
        "preset=none data={good} budget=8 finetune.training.batch_size=4 source_model={olmoe}",
        "source_model={olmoe} holds no safetensors weights "
        "(model.safetensors, or shards and model.safetensors.index.json)",
    ),
    *both(
        "preset=tiny data={good} target_model={missing}",
        "target_model={missing} does not exist; expected a folder, s3://bucket/prefix, or a hub name like OWNER/NAME",
    ),
    # warm-up
    stage(
        "warmup data={other} output_dir={out}",
        "selector_model.path= is missing (Select-MoE checkpoint, from `convert`)",
    ),
    stage(
        LEGACY + " training.quality_loss_type=sigmiod",
        "quality_loss_type='sigmiod' is unknown (did you mean sigmoid?); known: " + LOSSES,
    ),
    stage(
        LEGACY + " training.quality_loss_type=mse training.quality_loss_params={lambda_var:1}",
        "quality_loss_params has the unknown key 'lambda_var'; mse knows: target, sample_wise_averaging",
    ),
    stage(
        LEGACY + " training.mode=lora training.lora.target_modules=[query]",
        "training.lora.target_modules: the judge has no query; it has k_proj, lm_head, o_proj, q_proj, v_proj",
    ),
    stage(
        WARMUP + " training.batch_size=8 training.per_device_batch_size=3",
        "training.batch_size=8 is not a multiple of per_device_batch_size=3",
    ),
    stage(
        "warmup selector_model.path={small} data={other} output_dir={out}",
        "the tokenizer of {small} has 320 tokens, its model's embedding 10 rows",
    ),
    stage(WARMUP + " training.max_length=2", "no warm-up row has a token to learn: raise training.max_length"),
    stage(WARMUP + " training.max_length=4096", "training.max_length=4096 is over the 1024 positions of {judge}"),
    stage(
        "warmup selector_model.path={coded} data={other} output_dir={out}",
        "quality_loss_type=os:getcwd names code, which no checkpoint may: write sigmoid there, and give "
        "training.quality_loss_type=os:getcwd with allow_code=[os:getcwd] to warmup",
    ),
    # places
    stage(
        "ingest data={good} output_dir={taken}",
        "output_dir {taken} holds mine.txt, which is not a finished output: choose another folder",
    ),
    stage(
        "ingest data={good} output_dir={other} holdout=5",
        "{other} holds another run's output (holdout 4.0 there, 5.0 here): choose another output_dir",
    ),
    Case(
        (*STAGE, "run", "preset=tiny", "data={good}", "output_dir={other}"),
        "output_dir={other} holds the output of ingest: choose another output_dir",
    ),
    Case(
        (*STAGE, "run", "preset=tiny", "data={good}", "output_dir={taken}"),
        "output_dir={taken} holds mine.txt, which is not part of a run: choose another output_dir",
    ),
    stage(
        "ingest data={good} output_dir={good}/x",
        "output_dir {good}/x cannot be made: Not a directory; choose a folder you may write",
    ),
    # ports
    *(
        Case((*MAKE_RUN, "preset=tiny"), f"{variable}={port}{says}", {variable: port})
        for variable in ("SELECTMOE_S3_PORT", "SELECTMOE_MLFLOW_PORT")
        for port, says in (
            ("{port}", ": port {port} is taken by another process: choose a free one"),
            ("none", " is not a port (1 to 65535)"),
        )
    ),
    Case(
        (*MAKE_RUN, "preset=tiny"),
        "SELECTMOE_S3_PORT and SELECTMOE_MLFLOW_PORT are both 4711: give each server its own port",
        {"SELECTMOE_S3_PORT": "4711", "SELECTMOE_MLFLOW_PORT": "4711"},
    ),
    # S3
    *both(
        "preset=tiny data={good} work_root=s3://select-moe/work",
        WRONG_SECRET,
        AWS_SECRET_ACCESS_KEY="wrong",
    ),
    stage(
        INGEST + " work_root=s3://select-moe/work",
        WRONG_SECRET,
        AWS_SECRET_ACCESS_KEY="wrong",
    ),
    *both(
        "preset=tiny data={good} work_root=s3://no-such-bucket/work",
        NO_BUCKET,
    ),
    # credentials where they do not belong
    *both(
        "preset=tiny work_root=s3://me:pw@bucket/x",
        "work_root= looks like a credential: those come from " + KEYS,
    ),
    stage(
        INGEST + " aws_secret_access_key=pw", "aws_secret_access_key= looks like a credential: those come from " + KEYS
    ),
]


@dataclass(frozen=True)
class Here:
    """A folder with a user's things in it, and the environment of a command."""

    folder: Path
    places: dict[str, str]
    environment: dict[str, str]

    def tree(self) -> dict[str, bytes]:
        """Everything that is there."""
        return {str(p): p.read_bytes() if p.is_file() else b"" for p in self.folder.rglob("*")}

    def filled(self, text: str) -> str:
        """Text with the names of places put in."""
        for name, value in self.places.items():
            text = text.replace("{" + name + "}", value)
        return text


def row(n: int) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": f"answer {n}"}]}


@pytest.fixture(scope="module")
def judges(small_judge: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small judges, two of them with a `config.json` that fits them not or is not to be trusted."""
    places = {"judge": small_judge("observer"), "applied": small_judge("applied")}
    for name, change in {"small": {"vocab_size": 10}, "coded": {"quality_loss_type": "os:getcwd"}}.items():
        folder = tmp_path_factory.mktemp(name)
        for file in Path(places["judge"]).iterdir():
            if file.name not in ("manifest.json", "config.json"):
                (folder / file.name).symlink_to(file)
        config = json.loads((Path(places["judge"]) / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
        places[name] = str(folder)
    return places


@pytest.fixture(scope="module")
def here(judges: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    """A user's folder, a real S3 server beside it, and a port that is taken."""
    folder = tmp_path_factory.mktemp("user")
    rows: dict[str, list[dict[str, object]]] = {
        "good": [row(n) for n in range(40)],
        "empty": [],
        "few": [*(row(n) for n in range(97)), *(dict[str, object](x=1) for _ in range(3))],
    }
    places = {name: str(folder / name) for name in ("out", "missing", "llama", "olmoe", "taken", "other")}
    places |= judges
    places["not_json"] = str(folder / "not_json.jsonl")
    Path(places["not_json"]).write_text("this is\nno JSON\n")
    for name, lines in rows.items():
        places[name] = str(folder / f"{name}.jsonl")
        Path(places[name]).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for kind in ("llama", "olmoe"):
        (folder / kind).mkdir()
        (folder / kind / "config.json").write_text(json.dumps({"model_type": kind}))
    (folder / "taken").mkdir()
    (folder / "taken" / "mine.txt").write_text("precious")
    state = tmp_path_factory.mktemp("s3")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "SELECTMOE_", "MLFLOW_"))}
    environment |= {"PYTHONPATH": str(ROOT), "SELECTMOE_STATE": str(folder / "state")}
    s3: dict[str, servers.Server] = {}
    with socket.socket() as taken:
        taken.bind((servers.HOST, 0))
        taken.listen()
        places["port"] = str(taken.getsockname()[1])
        try:
            servers._launch(state, s3, "s3", servers._port("s3", None, None))
            servers._make_bucket(state, s3["s3"])
            environment |= servers.s3_environment(state, s3["s3"].url)
            found = Here(folder, places, environment)
            done = call(
                found, (*STAGE, *f"ingest data={places['good']} output_dir={places['other']} holdout=4".split())
            )
            assert done.returncode == 0, done.stderr
            yield found
        finally:
            servers.stop(state)


def call(here: Here, words: tuple[str, ...], **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(here.filled, words)]
    extra = {name: here.filled(value) for name, value in environment.items()}
    return subprocess.run(
        command, cwd=here.folder, env=here.environment | extra, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c.words[1]} {' '.join(c.words[2:])}{dict(c.environment) or ''}"
)
def test_a_mistake_is_one_line_and_leaves_nothing(case: Case, here: Here) -> None:
    before = here.tree()
    done = call(here, case.words, **case.environment)
    assert done.stderr == f"selectmoe: {here.filled(case.says)}\n"
    assert done.returncode == 2
    assert done.stdout == ""
    assert here.tree() == before


@pytest.mark.parametrize("words", [("--help",), ("route", "--help"), ("run", "--help")])
def test_a_reader_that_has_gone_is_no_error(words: tuple[str, ...], here: Here) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, *STAGE, *words]
    done = subprocess.run(
        command, cwd=here.folder, env=here.environment, stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", ["selectmoe", "pipelines.local"])
def test_a_signal_ends_it_with_one_line_and_no_child(number: int, code: int, command: str, here: Here) -> None:
    """The program waits for a child of a child, as a pipeline does; nothing of it survives, and no trace is shown."""
    module = "selectmoe.cli" if command == "selectmoe" else command
    # in the place of the work: what KFP's local runner does, a shell around an interpreter, from a thread
    program = f"""
import subprocess, sys, threading
import {module} as command
def work(*_):
    ask = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]
    threading.Thread(target=subprocess.run, args=(["sh", "-c", '"$@"; true', "sh", *ask],)).start()
    threading.Event().wait()
command.dispatch = command._dispatch = work
sys.exit(command.main(["run"]))
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=here.folder,
        env=here.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert said == "selectmoe: interrupted; the same command goes on from here\n"
    assert process.returncode == code
    deadline = time.monotonic() + 30
    while servers._start_mark(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not servers._start_mark(child)
