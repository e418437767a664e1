"""What changes re-runs exactly what is downstream of it: `pytest tests/unit/pipelines/test_mutation.py`.

Every parameter of the pipeline and every input is varied; a real `check` resolves both runs, and the cache keys of all
tasks are compared. `tests/integration/test_pipeline.py` executes some of these variations.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from components import _plan, _shell
from components.check.component import check
from pipelines.__main__ import ROOT
from tests.kfp_keys import Keys

CHAIN = ["ingest", "upcycle", "convert", "verify", "warmup", "route", "merge", "select", "finetune", "evaluate"]
END = ["report", "gate"]
BASE = "evaluate base"
"""The task that evaluates the model without an adapter."""


def after(stage: str) -> set[str]:
    """A stage and everything downstream of it; the base model's evaluation hangs on `ingest` and `upcycle` alone."""
    return {*CHAIN[CHAIN.index(stage) :], *END} | ({BASE} if stage in ("ingest", "upcycle") else set())


ALL = after("ingest")
ACCELERATED = after("upcycle")


class Site:
    """Rows and two checkpoints on disk, and runs over them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.spec = next(iter(yaml.safe_load_all((ROOT / "pipelines/select_moe/pipeline.yaml").read_text("utf-8"))))
        (root / "tasks").mkdir()
        (root / "tasks" / "mine.yaml").write_text("task: mine\n")
        self.pool("pool", 0)
        self.pool("other", 1)
        for name, value in (("a", 1), ("b", 2), ("c", 3)):
            self.model(name, value)
        self.parameters = {
            "work_root": str(root / "work"),
            "preset": "tiny",
            "data": str(root / "pool"),
            "source_model": str(root / "a"),
            "target_model": str(root / "b"),
            "config": self.config(),
        }

    def config(self, *further: str) -> list[str]:
        """The pipeline's parameter `config`: a dense judge, a folder of evaluation tasks, and `further` settings."""
        return ["judge=upcycle", f"evaluate.include_path={self.root / 'tasks'}", *further]

    def pool(self, name: str, first: int) -> None:
        (self.root / name).mkdir()
        rows = [
            {"messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": f"a {n}"}]}
            for n in range(first, 300)
        ]
        (self.root / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def model(self, name: str, value: int) -> None:
        folder = self.root / name
        folder.mkdir()
        sizes = {"num_attention_heads": 1, "hidden_size": 1, "num_hidden_layers": 1}
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | sizes))
        words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
        header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        data = struct.pack("<Q", len(header)) + header + struct.pack("<f", value)
        (folder / "model.safetensors").write_bytes(data)

    def keys(self, **changes: Any) -> dict[str, str]:
        """The keys of all tasks of a run, with some of its parameters changed."""
        given = self.parameters | changes
        entries = self.spec["root"]["inputDefinitions"]["parameters"]
        full = {name: given.get(name, entry.get("defaultValue")) for name, entry in entries.items()}
        named = {name: full[name] for name in _plan.PARAMETERS}
        named |= {name: int(full[name]) for name in ("seeds", "shards", "accelerator_count")}
        hardware = _shell.Hardware(full["accelerator_type"], int(full["accelerator_count"]), full["memory"])
        place = self.root / "checked" / str(len(list((self.root / "checked").glob("*"))))
        artifact = SimpleNamespace(path=str(place), metadata={})
        values = _plan.check(artifact, named, full["config"], hardware)
        names = [name for name in check.component_spec.outputs if name != "checked"]
        return Keys(self.spec, {"check": dict(zip(names, values, strict=True))}).walk(given)

    def changed(self, before: dict[str, str], after: dict[str, str]) -> set[str]:
        """Tasks that the second run executes and the first had not, without those that are never cached."""
        new = {name for name, key in after.items() if key not in before.values()} - {"check", "finish"}
        return {BASE if name == "evaluate" else name.split("[")[0].removesuffix("-2") for name in new}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "SELECTMOE_EVENTS", "SELECTMOE_RUN_ID"):
            patch.delenv(name, raising=False)
        return Site(tmp_path_factory.mktemp("mutation"))


@pytest.fixture(scope="module")
def base(site: Site) -> dict[str, str]:
    return site.keys()


def test_an_unchanged_run_executes_nothing(site: Site, base: dict[str, str]) -> None:
    assert site.changed(base, site.keys()) == set()
    assert site.changed({}, base) == ALL, "the first one executes everything"


VARIED: list[tuple[str, Any, set[str]]] = [
    ("preset", "quick", ALL),
    ("data", "other", ALL),
    ("source_model", "c", after("upcycle")),
    ("target_model", "c", {"finetune", "evaluate", BASE, *END}),
    ("budget", "9", after("select")),
    ("arms", "selected,random,nll", after("select")),
    ("seeds", 4, after("select")),
    ("tasks", "mine", {"evaluate", BASE, *END}),
    ("shards", 2, after("route")),
    ("accelerator_type", "amd.com/gpu", set()),  # none is asked for: its kind is of no account
    ("accelerator_count", 1, ACCELERATED),
    ("memory", "32Gi", ACCELERATED),
    ("gate", "fail", {"gate"}),
    ("work_root", "elsewhere", ALL),
    ("config", ["seed=7"], ALL),
    ("config", ["warmup.training.epochs=2"], after("warmup")),
    ("config", ["route.token_budget=1024"], after("route")),
    ("config", ["select.filter.drop=0.2"], after("select")),
    ("config", ["finetune.training.epochs=2"], after("finetune")),
    ("config", ["evaluate.max_length=64"], {"evaluate", BASE, *END}),
    ("config", ["report.show_text=false"], {*END}),
]


@pytest.mark.parametrize(("name", "value", "expected"), VARIED, ids=lambda v: str(v)[:30] if isinstance(v, str) else "")
def test_a_changed_parameter(site: Site, base: dict[str, str], name: str, value: Any, expected: set[str]) -> None:
    if name == "config":
        value = site.config(*value)
    if name in ("data", "source_model", "target_model", "work_root"):
        value = str(site.root / value)
    assert site.changed(base, site.keys(**{name: value})) == expected


def test_every_parameter_is_varied(site: Site) -> None:
    assert {name for name, _, _ in VARIED} == {*site.spec["root"]["inputDefinitions"]["parameters"]}


INPUTS: list[tuple[str, set[str]]] = [
    ("pool/rows.jsonl", ALL),
    ("a/model.safetensors", after("upcycle")),
    ("b/model.safetensors", {"finetune", "evaluate", BASE, *END}),
]


@pytest.mark.parametrize(("path", "expected"), INPUTS, ids=[path for path, _ in INPUTS])
def test_an_input_that_is_edited_in_its_place(site: Site, base: dict[str, str], path: str, expected: set[str]) -> None:
    file = site.root / path
    whole = file.read_bytes()
    edit: Callable[[bytes], bytes] = (
        (lambda data: data.replace(b"a 7", b"a seven"))
        if path.endswith("jsonl")
        else (lambda data: data[:-1] + b"\x41")
    )
    file.write_bytes(edit(whole))
    try:
        assert site.changed(base, site.keys()) == expected
    finally:
        file.write_bytes(whole)


def test_changed_code_runs_everything_again(site: Site, base: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from selectmoe import check as stage

    monkeypatch.setattr(stage, "code_digest", lambda: "another program")
    assert site.changed(base, site.keys()) == ALL


def test_another_image_runs_everything_again(site: Site, base: dict[str, str]) -> None:
    for executor in site.spec["deploymentSpec"]["executors"].values():
        executor["container"]["image"] += "x"
    try:
        assert site.changed(base, site.keys()) == ALL
    finally:
        for executor in site.spec["deploymentSpec"]["executors"].values():
            executor["container"]["image"] = executor["container"]["image"].removesuffix("x")
