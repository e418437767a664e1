"""Bad set-ups, each caught by `check` with one line that names the fix: pytest tests/integration/test_check.py

Real servers (S3: nanio; MLflow) wherever they can be brought into the state; the model hub, a policy without write
right, a proxy's 401 and a server that hangs are stand-ins (`stand_ins.py`). The table runs in this process.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from selectmoe import cache, check, cli, manifest, storage, tracking
from selectmoe.errors import UserError
from tests.serving import S3Server

sys.path.insert(0, str(Path(__file__).parent))
from mlflow_server import MlflowServer, free_port
from stand_ins import ACCESS_DENIED, Answering, Hanging, Hub

WORDS = ["river", "stone", "lantern", "copper", "window", "garden", "engine", "silver", "paper", "mountain"]


def row(n: int) -> dict[str, Any]:
    question = f"What is a {WORDS[n % 10]} to the {WORDS[n // 10 % 10]}?"
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"Number {n} of its kind."}]
    return {"id": str(n), "messages": turns}


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


@dataclass
class Site:
    """The parts of a set-up that works, made once."""

    root: Path
    s3: S3Server
    started: MlflowServer
    standing: list[Any] = field(default_factory=list)

    @property
    def mlflow(self) -> MlflowServer:
        """The server, when it has come up."""
        while not self.started.answers():
            assert self.started.process is not None
            assert self.started.process.poll() is None, (self.root / "mlflow" / "mlflow.log").read_text()[-3000:]
        return self.started

    @property
    def words(self) -> dict[str, str]:
        return {
            "data": str(self.root / "data.jsonl"),
            "source_model": str(self.root / "olmoe"),
            "target_model": str(self.root / "llama"),
            "budget": "8",
            "ingest.holdout": "8",
            "finetune.training.batch_size": "4",
        }

    def stand_in(self, server: Any) -> str:
        self.standing.append(server)
        url: str = server.url
        return url


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("site")
    (root / "s3").mkdir()
    (root / "mlflow").mkdir()
    mlflow = MlflowServer(root / "mlflow")
    mlflow.start(wait=False)  # it comes up while other things are tried
    made = Site(root, S3Server(root / "s3", "bucket"), mlflow)
    try:
        make_models(root)
        yield made
    finally:
        mlflow.kill()
        made.s3.close()


def make_models(root: Path) -> None:
    """Rows, an output, and two models as far as `check` reads them: config, weights of few numbers, a tokenizer."""
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    write_rows(root / "data.jsonl", [row(n) for n in range(60)])
    write_rows(root / "pool" / "manifest.json", [{}])
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 64, "max_position_embeddings": 128}
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["<eos>", "<unk>", *WORDS])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "unk_token": "<unk>"}
    for kind, more in (("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}), ("llama", {})):
        (root / kind).mkdir()
        (root / kind / "config.json").write_text(json.dumps({"model_type": kind, **sizes, **more}))
        (root / kind / "tokenizer_config.json").write_text(json.dumps(settings))
        tokenizer.save(str(root / kind / "tokenizer.json"))
        save_file({"model.embed_tokens.weight": np.ones((2048, 32), np.float32)}, root / kind / "model.safetensors")


class Here(NamedTuple):
    """What a row of the table arranges its set-up with."""

    site: Site
    tmp: Path
    patch: pytest.MonkeyPatch

    def environment(self, **values: str) -> None:
        for name, value in values.items():
            self.patch.setenv(name, value)

    def s3(self, **values: str) -> None:
        self.environment(**{**self.site.s3.environment(), **values})

    def mlflow(self, url: str, seconds: float = 2.0) -> None:
        self.patch.setenv("MLFLOW_TRACKING_URI", url)
        self.patch.setattr(tracking, "prove", functools.partial(tracking.prove, seconds=seconds))

    def hub(self, url: str) -> None:
        """The hub's address is read when its library is imported."""
        from huggingface_hub import constants

        self.patch.setattr(constants, "ENDPOINT", url)
        self.patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        self.patch.setattr(constants, "HF_HUB_OFFLINE", False)

    def rows(self, rows: list[Any], name: str = "rows.jsonl") -> dict[str, str]:
        return {"data": str(write_rows(self.tmp / name, rows))}

    def file(self, name: str, content: bytes) -> str:
        (self.tmp / name).parent.mkdir(parents=True, exist_ok=True)
        (self.tmp / name).write_bytes(content)
        return str(self.tmp / name)

    def model(self, kind: str = "llama") -> Path:
        """A copy of a model that works, to be broken."""
        shutil.copytree(self.site.root / kind, self.tmp / "model", ignore=shutil.ignore_patterns("manifest.json"))
        return self.tmp / "model"


Arrange = Callable[[Here], dict[str, str] | None]


class Bad(NamedTuple):
    """A bad set-up: how it differs from the one that works, and what the message must hold."""

    name: str
    words: dict[str, str]
    wanted: tuple[str, ...]
    arrange: Arrange = lambda here: None


def on_s3(name: str, wanted: tuple[str, ...], arrange: Arrange, uri: str = "s3://bucket/work") -> Bad:
    return Bad(name, {"work_root": uri}, wanted, arrange)


def blocked_artifacts(here: Here) -> None:
    """MLflow's own folder of artifacts becomes a file; `the_site_again` puts it back."""
    shutil.rmtree(here.site.root / "mlflow" / "artifacts", ignore_errors=True)
    (here.site.root / "mlflow" / "artifacts").write_text("no folder")
    here.mlflow(here.site.mlflow.url)


def truncated(here: Here) -> dict[str, str]:
    model = here.model()
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return {"target_model": str(model)}


def shard_missing(here: Here) -> dict[str, str]:
    model = here.model()
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return {"target_model": str(model)}


def without(*globs: str) -> Arrange:
    def arrange(here: Here) -> dict[str, str]:
        model = here.model()
        for path in [p for glob in globs for p in model.glob(glob)]:
            path.unlink()
        return {"target_model": str(model)}

    return arrange


def of_type(model_type: str) -> Arrange:
    def arrange(here: Here) -> dict[str, str]:
        path = here.model() / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": model_type}))
        return {"target_model": str(path.parent)}

    return arrange


def bad_name(here: Here) -> dict[str, str]:
    write_rows(here.tmp / "datasets" / "two words.jsonl", [row(n) for n in range(30)])
    return {"data": str(here.tmp / "datasets")}


def of_another_run(here: Here) -> dict[str, str]:
    words = here.site.words | {"output_dir": str(here.tmp / "taken"), "budget": "12"}
    assert cli.main(["check", *(f"{key}={value}" for key, value in words.items())]) == 0
    return {"output_dir": str(here.tmp / "taken")}


def stored_model(here: Here) -> None:
    """The dense model on S3, as a plain folder."""
    here.s3()
    cache.store(here.site.root / "llama", "s3://bucket/models/llama")


def silent_s3(here: Here) -> None:
    here.patch.setitem(storage.QUICK, "patience", 0.3)
    here.s3(AWS_ENDPOINT_URL_S3=here.site.stand_in(Hanging()))


def full_disk(here: Here) -> None:
    usage = shutil.disk_usage(here.tmp)
    here.patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))


S3 = [
    on_s3(
        "endpoint that nobody serves",
        ("s3://bucket/work", "does not answer", "AWS_ENDPOINT_URL_S3"),
        lambda h: h.s3(AWS_ENDPOINT_URL_S3=f"http://127.0.0.1:{free_port()}"),
    ),
    on_s3(
        "endpoint that is no address",
        ("AWS_ENDPOINT_URL_S3=minio", "https://host:port"),
        lambda h: h.s3(AWS_ENDPOINT_URL_S3="minio"),
    ),
    on_s3(
        "endpoint that is no S3",
        ("s3://bucket/work", "AWS_ENDPOINT_URL_S3"),
        lambda h: h.s3(AWS_ENDPOINT_URL_S3=h.site.stand_in(Answering(200, "<html>Welcome</html>"))),
    ),
    on_s3("endpoint that hangs", ("s3://bucket/work", "does not answer", "AWS_ENDPOINT_URL_S3"), silent_s3),
    on_s3("bucket missing", ("no bucket absent", "create it"), lambda h: h.s3(), "s3://absent/work"),
    on_s3(
        "no write right",
        ("s3://bucket/work", "may not write", "AccessDenied"),
        lambda h: h.s3(
            AWS_ENDPOINT_URL_S3=h.site.stand_in(Answering(403, ACCESS_DENIED, Content_Type="application/xml"))
        ),
    ),
    on_s3(
        "wrong secret", ("SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"), lambda h: h.s3(AWS_SECRET_ACCESS_KEY="x")
    ),
    on_s3("wrong key id", ("InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"), lambda h: h.s3(AWS_ACCESS_KEY_ID="nobody")),
    on_s3("password in the URI", ("work_root=", "credential"), lambda h: h.s3(), "s3://key:word@bucket/work"),
    on_s3("URI without a bucket", ("s3://bucket/prefix",), lambda h: h.s3(), "s3:///work"),
    Bad("model_root in a missing bucket", {"model_root": "s3://absent/m"}, ("no bucket absent",), lambda h: h.s3()),
    Bad("data in a missing bucket", {"data": "s3://absent/rows.jsonl"}, ("no bucket absent",), lambda h: h.s3()),
    Bad(
        "data missing on S3",
        {"data": "s3://bucket/rows.jsonl"},
        ("s3://bucket/rows.jsonl", "not exist"),
        lambda h: h.s3(),
    ),
]

MLFLOW = [
    Bad(
        "MLflow that nobody serves",
        {},
        ("cannot be reached", "MLFLOW_TRACKING_URI", "mlflow.required=false"),
        lambda h: h.mlflow(f"http://127.0.0.1:{free_port()}"),
    ),
    Bad(
        "MLflow that hangs",
        {},
        ("cannot be reached", "MLFLOW_TRACKING_URI"),
        lambda h: h.mlflow(h.site.stand_in(Hanging())),
    ),
    Bad(
        "MLflow under another host name",
        {},
        ("403", "--allowed-hosts 0x7f.1:"),
        lambda h: h.mlflow(h.site.mlflow.url.replace("127.0.0.1", "0x7f.1"), 20.0),
    ),
    Bad(
        "MLflow without credentials",
        {},
        ("refuses us (401)", "MLFLOW_TRACKING_USERNAME"),
        lambda h: h.mlflow(h.site.stand_in(Answering(401, "You are not authenticated.")), 20.0),
    ),
    Bad("MLflow without its artifact store", {}, ("artifact store", "--artifacts-destination"), blocked_artifacts),
    Bad(
        "MLflow that is another server",
        {},
        ("is not MLflow", "MLFLOW_TRACKING_URI"),
        lambda h: h.mlflow(h.site.stand_in(Answering(404, "not found")), 20.0),
    ),
    Bad("MLflow required, none named", {"mlflow.required": "true"}, ("mlflow.required=true", "MLFLOW_TRACKING_URI")),
]

MODELS = [
    Bad("unknown model", {"source_model": "absent/folder/x"}, ("source_model=absent/folder/x", "does not exist")),
    Bad("model of another kind", {"source_model": "LLAMA"}, ("'llama'", "expected olmoe", "judge=upcycle")),
    Bad("nothing to upcycle", {"judge": "upcycle"}, ("'olmoe'", "expected llama")),
    Bad("target of another kind", {}, ("target_model=", "'vit'"), of_type("vit")),
    Bad("folder that is no model", {"target_model": "TMP"}, ("target_model=", "config.json")),
    Bad("model without weights", {}, ("target_model=", "no safetensors weights"), without("*.safetensors")),
    Bad("weights that were cut off", {}, ("model.safetensors", "copy it again"), truncated),
    Bad("weights that lack a shard", {}, ("lacks the shard model-00002-of-00002.safetensors",), shard_missing),
    Bad("model without a tokenizer", {}, ("no tokenizer", "model"), without("tokenizer*")),
]

HUB = [
    Bad(
        "no model of that name",
        {"target_model": "maker/absent"},
        ("target_model=maker/absent: the hub has no model maker/absent", "HF_TOKEN"),
        lambda h: h.hub(h.site.stand_in(Hub(h.site.root / "llama"))),
    ),
    Bad(
        "gated model without a token",
        {"target_model": "maker/model"},
        ("maker/model", "is gated", "HF_TOKEN"),
        lambda h: h.hub(h.site.stand_in(Hub(h.site.root / "llama", gated=True))),
    ),
    Bad(
        "model of another kind on the hub",
        {"source_model": "maker/model"},
        ("source_model=maker/model", "'llama'", "expected olmoe"),
        lambda h: h.hub(h.site.stand_in(Hub(h.site.root / "llama"))),
    ),
    Bad(
        "hub that is down",
        {"target_model": "maker/model"},
        ("target_model=maker/model", "the hub"),
        lambda h: h.hub(h.site.stand_in(Answering(500))),
    ),
    Bad(
        "model missing on S3",
        {"target_model": "s3://bucket/models/absent"},
        ("target_model=s3://bucket/models/absent", "does not exist"),
        lambda h: h.s3(),
    ),
    Bad(
        "model of another kind on S3",
        {"source_model": "s3://bucket/models/llama"},
        ("source_model=s3://bucket/models/llama has", "'llama'", "expected olmoe"),
        stored_model,
    ),
]

DATA = [
    Bad("data missing", {"data": "absent.jsonl"}, ("data=absent.jsonl", "does not exist")),
    Bad("data not named", {"data": ""}, ("data= is missing",)),
    Bad("data empty", {}, ("the pool is empty",), lambda h: h.rows([])),
    Bad("data malformed", {}, ("rows.jsonl", "not JSON"), lambda h: {"data": h.file("rows.jsonl", b"no\nJSON\n")}),
    Bad(
        "rows without messages",
        {},
        ("3 of 100 rows", "line 98"),
        lambda h: h.rows([row(n) for n in range(97)] + [{"x": 1}] * 3),
    ),
    Bad("data of no known kind", {}, ("rows.csv", ".parquet"), lambda h: {"data": h.file("rows.csv", b"a,b\n")}),
    Bad("Parquet that is none", {}, ("rows.parquet",), lambda h: {"data": h.file("rows.parquet", b"PAR1 no")}),
    Bad(
        "dataset that is not there",
        {"ingest.dataset.local.dataset_names": "[cot]"},
        ("'cot'", "there are: data"),
    ),
    Bad("dataset with a name that is not allowed", {}, ("'two words'", "rename it"), bad_name),
    Bad(
        "decompression bomb",
        {},
        ("rows.jsonl.gz", "200 times"),
        lambda h: {"data": h.file("rows.jsonl.gz", gzip.compress((b" " * 999 + b"\n") * 80_000))},
    ),
    Bad("data that is an output", {"data": "POOL"}, ("an output of Select-MoE already",)),
    Bad("nothing to evaluate with", {"ingest.holdout": "0"}, ("ingest.holdout=0",)),
    Bad("everything held out", {"ingest.holdout": "60"}, ("holdout=60",)),
]

BUDGETS = [
    *(
        Bad(f"budget {value}", {"budget": value}, (f"budget={value}", "share above 0"))
        for value in ("0", "0.0", "1.5", "-1", "abc", "0t")
    ),
    Bad("more rows than there are", {"budget": "600"}, ("budget=600", "52 (60 read, 8 held out)", "leaves 37")),
    Bad(
        "share that the filter does not leave",
        {"budget": "0.9"},
        ("budget=0.9 is 47 rows", "filter.drop=0.3", "leaves 37"),
    ),
    Bad("more tokens than there are", {"budget": "900000t"}, ("budget=900000t", "bytes in all")),
    Bad("more warm-up rows than there are", {"warmup.training.rows": "99"}, ("warmup.training.rows=99", "52 rows")),
    Bad(
        "micro-batch above the batch",
        {"finetune.training.per_device_batch_size": "8"},
        ("per_device_batch_size=8", "batch_size=4"),
    ),
    Bad("batch above the rows", {"finetune.training.batch_size": "16"}, ("batch_size=16", "8 rows", "lower it")),
    Bad(
        "batch that accelerators cannot share",
        {"accelerator.type": "nvidia.com/gpu", "accelerator.count": "2"},
        ("batch_size=4", "2 accelerators"),
    ),
]

RUNS = [
    Bad("unknown accelerator", {"accelerator.type": "nvidia.com/gpus"}, ("nvidia.com/gpus", "nvidia.com/gpu,")),
    Bad("negative accelerators", {"accelerator.count": "-1"}, ("accelerator.count=-1",)),
    Bad("accelerators without a type", {"accelerator.count": "2"}, ("accelerator.count=2", "accelerator.type")),
    Bad("memory in GB", {"accelerator.memory": "16GB"}, ("accelerator.memory=16GB", "16Gi")),
    Bad("memory without a unit", {"accelerator.memory": "16"}, ("16 bytes", "16Gi")),
    Bad("zero shards", {"shards": "0"}, ("shards=0",)),
    Bad("too few seeds", {"seeds": "2"}, ("seeds=2", "at least 3")),
    Bad("unknown arm", {"arms": "[selected,random,best]"}, ("'best'", "balanced_random")),
    Bad("arm twice", {"arms": "[selected,random,random]"}, ("twice",)),
    Bad("no random arm", {"arms": "[selected]"}, ("selected and random",)),
    Bad("arm that routing does not score", {"arms": "[selected,random,nll]"}, ("arm nll", "route.nll=true")),
    Bad("oracle without planted rows", {"arms": "[selected,random,oracle]"}, ("oracle", "ingest.plant.share")),
    Bad("unknown judge", {"judge": "gpt"}, ("judge='gpt'", "upcycle")),
    Bad("unknown gate", {"report.gate": "maybe"}, ("maybe",)),
    Bad("unknown preset", {"preset": "quik"}, ("quik",)),
    Bad("unknown key", {"bugdet": "5"}, ("'bugdet'", "budget")),
    Bad("wrong type", {"seeds": "many"}, ("seeds", "many")),
    Bad("key of the run itself", {"select.selection_rows": "5"}, ("select.selection_rows", "set by the run")),
    Bad("stage out of its range", {"warmup.training.epochs": "0"}, ("training.epochs=0",)),
    Bad("credential as a key", {"aws_secret_access_key": "x"}, ("credential", "environment")),
    Bad("unknown task", {"evaluate.tasks": "[no_such_task]"}, ("'no_such_task'", "include_path=")),
    Bad("tasks that are not there", {"evaluate.include_path": "absent"}, ("evaluate.include_path=absent",)),
    Bad("unknown task to clear of", {"ingest.decontaminate.tasks": "[no_such_task]"}, ("'no_such_task'", "lm-eval")),
    Bad(
        "tasks to clear of that are not there",
        {"ingest.decontaminate.tasks": "[mine]", "ingest.decontaminate.include_path": "absent"},
        ("decontaminate.include_path=absent",),
    ),
    Bad("threshold out of its range", {"ingest.near_duplicates.threshold": "2"}, ("near_duplicates.threshold=2",)),
]

PLACES = [
    Bad("work_root that is a file", {}, ("work_root=", "is a file"), lambda h: {"work_root": h.file("file", b"")}),
    Bad("model_root below a file", {}, ("model_root=", "is a file"), lambda h: {"model_root": h.file("f", b"") + "/m"}),
    Bad("output_dir of another run", {}, ("another run's output", "budget"), of_another_run),
    Bad(
        "output_dir with something in it",
        {"output_dir": "TMP"},
        ("mine.txt",),
        lambda h: h.file("mine.txt", b"") and None,
    ),
    Bad("output_dir missing", {"output_dir": "???"}, ("output_dir= is missing",)),
    Bad("no room on the disk", {}, ("GB free", "make room"), full_disk),
]

TABLE = [*S3, *MODELS, *HUB, *DATA, *BUDGETS, *RUNS, *PLACES, *MLFLOW]


@pytest.fixture(autouse=True)
def the_site_again(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing of this machine's own settings counts, and what a row broke is mended."""
    for name in [n for n in os.environ if n.startswith(("AWS_", "MLFLOW_", "HF_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SELECTMOE_MODEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    yield
    while site.standing:
        site.standing.pop().close()
    artifacts = site.root / "mlflow" / "artifacts"
    if artifacts.is_file():
        artifacts.unlink()


def words_of(site: Site, tmp: Path, *changes: dict[str, str] | None) -> list[str]:
    places = {"LLAMA": site.root / "llama", "POOL": site.root / "pool", "TMP": tmp}
    words = site.words | {"output_dir": str(tmp / "out")}
    for change in changes:
        words |= {key: str(places.get(value, value)) for key, value in (change or {}).items()}
    return [f"{key}={value}" for key, value in words.items()]


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) >= 40
    assert len({bad.name for bad in TABLE}) == len(TABLE)


@pytest.mark.parametrize("bad", TABLE, ids=[bad.name for bad in TABLE])
def test_a_bad_set_up_is_one_line(
    bad: Bad, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = bad.arrange(Here(site, tmp_path, monkeypatch))
    capsys.readouterr()
    assert cli.main(["check", *words_of(site, tmp_path, bad.words, changes)]) == 2
    said = capsys.readouterr()
    message = said.err.strip().splitlines()[-1]
    assert message.startswith("selectmoe: ")
    assert all(text in message for text in bad.wanted), message
    assert "mistakes:" not in message, "one thing is wrong, one thing is said"
    assert "right-secret" not in said.err + said.out
    assert not (tmp_path / "out").exists()


def call(site: Site, tmp: Path, *changes: dict[str, str], **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "selectmoe", "check", *words_of(site, tmp, *changes)]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )


def planned(site: Site, tmp: Path, **changes: str) -> check.Plan:
    """The plan of a set-up that works, made in this process."""
    return check.plan(cli.compose("check", words_of(site, tmp, changes)))


def test_several_mistakes_are_said_together(site: Site, tmp_path: Path) -> None:
    """From the shell."""
    changes = {"work_root": "s3://absent/work", "target_model": "absent/folder/x", "data": "absent.jsonl"}
    done = call(site, tmp_path, changes, **site.s3.environment())
    message = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2
    assert "3 mistakes: (1)" in message
    assert all(text in message for text in ("no bucket absent", "absent/folder/x", "absent.jsonl")), message


def test_a_set_up_that_works(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything on real servers; what was written to try them is gone again, and the screen shows the estimate."""
    changes = {
        "work_root": "s3://bucket/work",
        "accelerator.type": "nvidia.com/mig-1g.10gb",
        "accelerator.count": "1",
        "accelerator.memory": "16Gi",
        "shards": "2",
    }
    environment = {**site.s3.environment(), "MLFLOW_TRACKING_URI": site.mlflow.url}
    done = call(site, tmp_path, changes, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out")
    assert "60 rows" in done.stderr
    assert "FLOPs" in done.stderr
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    costs = found["estimate"]
    assert costs["rows_selected"] == 8
    assert costs["fine_tunings"] == 10
    assert costs["flops"]["total"] > costs["flops"]["route"] > 0
    assert costs["bytes"]["output_dir"] > 0
    assert set(costs["hours"]) == {"cpu", "a100", "h100"}
    assert not [path for path in (site.root / "s3" / "bucket" / "work").rglob("*") if path.is_file()]

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["check", *words_of(site, tmp_path, changes, {"shards": "3"})]) == 0
    assert json.loads((tmp_path / "out" / "check.json").read_text())["shards"] == 3, "never an old answer"


def test_data_on_s3_are_read_where_they_lie(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Here(site, tmp_path, monkeypatch).s3()
    (site.root / "s3/bucket/rows").mkdir()
    shutil.copy(site.root / "data.jsonl", site.root / "s3/bucket/rows/data.jsonl")
    there = planned(site, tmp_path, data="s3://bucket/rows/data.jsonl")
    assert there.digests["pool"] == planned(site, tmp_path).digests["pool"]
    assert not [path for path in cache.root().rglob("*") if path.name.endswith(".jsonl")], "no copy is kept"


def test_the_tasks_that_a_pool_is_cleared_of_are_part_of_the_plan(site: Site, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    data = write_rows(
        tasks / "mine.jsonl", [{"q": row(3)["messages"][0]["content"] + " of eight words or some more", "a": "x"}]
    )
    (tasks / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files: {{test: {data}}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: q\ndoc_to_target: a\nmetric_list:\n  - metric: exact_match\n"
    )
    given = {"ingest.decontaminate.tasks": "[mine]", "ingest.decontaminate.include_path": str(tasks)}
    found = planned(site, tmp_path, **given).stages["ingest"]["decontaminate"]
    assert found["include_path"] == str(tasks)
    assert found["include_digest"] == manifest.tree_identity(tasks)


def test_mlflow_is_not_asked_where_it_is_not_required(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    assert planned(site, tmp_path, **{"mlflow.required": "false"}).digests


def test_only_a_server_that_is_silent_is_not_the_users_mistake(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent_s3(Here(site, tmp_path, monkeypatch))
    assert cli.main(["check", *words_of(site, tmp_path, {"data": "s3://bucket/rows.jsonl"})]) == 1


def test_a_model_of_the_hub_is_proved_without_its_weights(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(site.root / "llama")
    Here(site, tmp_path, monkeypatch).hub(site.stand_in(hub))
    found = planned(site, tmp_path, target_model=Hub.NAME)
    assert sorted(hub.sent) == ["config.json", "tokenizer.json", "tokenizer_config.json"]
    assert found.uris["target_model"] == f"hf://{Hub.NAME}@{Hub.COMMIT}"
    assert found.digests["target_model"] == manifest.tree_identity(site.root / "llama")
    reference = cache.Reference(found.uris["target_model"], found.digests["target_model"])
    assert (cache.fetch(reference) / "model.safetensors").is_file(), "what a later task brings here is the same"
    hub.close()
    assert planned(site, tmp_path, target_model=reference.uri).digests == found.digests, "from the hub's own cache"


def test_a_model_on_s3_is_brought_here_only_when_everything_is_proved(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored_model(Here(site, tmp_path, monkeypatch))
    on_s3 = {"target_model": "s3://bucket/models/llama"}
    with pytest.raises(UserError, match="budget=600"):
        planned(site, tmp_path, **on_s3, budget="600")
    assert not cache.root().exists()
    found = planned(site, tmp_path, **on_s3)
    assert found.uris == {"source_model": str(site.root / "olmoe"), **on_s3}
    assert found.digests["target_model"] == manifest.tree_identity(site.root / "llama")
    assert (cache.root() / found.digests["target_model"] / "model.safetensors").is_file()


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_dry_run_proves_and_estimates_and_writes_nothing(
    command: str, site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, *words_of(site, tmp_path), "dry_run=true"]) == 0
    said = capsys.readouterr().out
    assert "60 rows" in said
    assert "on h100" in said
    assert cli.main([command, *words_of(site, tmp_path, {"budget": "600"}), "dry_run=true"]) == 2
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_a_preset_makes_no_demo(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["preset=quick", f"demo_dir={tmp_path / 'demo'}", f"output_dir={tmp_path / 'out'}", "dry_run=true"]
    assert cli.main(["run", *words]) == 0
    assert "no estimate" in capsys.readouterr().out
    assert not (tmp_path / "demo").exists()
    assert not (tmp_path / "out").exists()
