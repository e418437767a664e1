"""What the components' own tests share: one tiny chain in one process, and every component alone on what that wrote.

    pytest components          every component, in this process and with KFP's local runner
    pytest components/merge    one of them

A component adds no behaviour: what it writes has the identity of what the chain wrote for its stage.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl, local

from selectmoe import compare, runlog, upcycle
from selectmoe import manifest as mf
from selectmoe import run as whole
from selectmoe.cache import Reference
from selectmoe.config import load

ROOT = Path(__file__).parents[1]
OUTSIDE = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "SELECTMOE_EVENTS")
"""Environment variables by which whoever runs the tests would take part in them."""
ARM = "selected:1"
"""The arm and seed on which `finetune` and `evaluate` are tried."""


@contextmanager
def environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in OUTSIDE:
            patch.delenv(name, raising=False)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")  # two tests run side by side
        patch.setenv(runlog.RUN, "alone")
        yield


class Chain:
    """`selectmoe run preset=tiny shards=2`, and beside it what only the pipelines do: `upcycle` and `compare`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.demo = root / "demo"
        self.output = root / "run"

    def make(self) -> None:
        """Do the work once for all processes that share the folder."""
        self.root.mkdir(exist_ok=True)
        with open(self.root / "lock", "w") as lock, environment():
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (self.root / "finished").exists():
                whole.run(whole.compose([*self.settings, f"output_dir={self.output}", "shards=2", "threads=1"]))
                self._further()
                (self.root / "finished").touch()

    def _further(self) -> None:
        selections = self.output / "selections"
        shutil.copytree(self.output / "baseline", selections)
        shutil.copytree(self.output / "select", selections / "selected")
        small_llama(self.output / "dense", tokenizer=self.output / "pretrain")
        given = {"source_model": self.path("dense"), "data": self.path("ingest")}
        upcycle.run(load(upcycle.UpcycleConfig, self.config("upcycle"), output_dir=self.path("upcycle"), **given))
        paths = {"selections": str(selections), "planted": self.path("ingest"), "evaluations": self.evaluations}
        compare.run(load(compare.CompareConfig, {}, output_dir=self.path("compare"), **paths))

    @property
    def settings(self) -> list[str]:
        return ["preset=tiny", f"demo_dir={self.demo}"]

    @property
    def checked(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.output / "check" / "check.json").read_text(encoding="utf-8"))
        return found

    @property
    def evaluations(self) -> list[str]:
        return [self.path(f"evaluate/{item.replace(':', '-')}") for item in self.checked["arm_seeds"]]

    def path(self, stage: str) -> str:
        return str(self.output / stage)

    def config(self, stage: str) -> dict[str, Any]:
        return dict(self.checked["stages"].get(stage, {}))

    def reference(self, stage: str) -> str:
        return Reference(self.path(stage), mf.identity_of(self.path(stage))).to_json()


def small_llama(folder: Path, tokenizer: Path) -> None:
    """A dense model of two layers."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    words = AutoTokenizer.from_pretrained(tokenizer)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(words))).save_pretrained(folder)
    words.save_pretrained(folder)


@dataclass(frozen=True)
class Case:
    """How a component is called beside what they have in common, and what it writes: output -> the chain's folder."""

    given: dict[str, Any]
    writes: dict[str, str] = field(default_factory=dict)


def cases(chain: Chain) -> dict[str, Case]:
    """Every component's own inputs; artifacts as the folders that the chain wrote."""
    at, demo = chain.path, [f"demo_dir={chain.demo}", "threads=1"]
    rows, selector = {"pool": at("ingest")}, {"selector": chain.reference("convert")}
    judge = {"source": chain.reference("pretrain")}
    routed = {"router_data": at("merge")}
    chosen = {"selections": at("selections")}
    tuned = {"target": "", "arm_seed": ARM, **judge}
    run, found = ARM.replace(":", "-"), {"evaluations": chain.evaluations}
    adapters = [path.replace("/evaluate/", "/finetune/") for path in chain.evaluations]
    sizes = {"preset": "tiny", "budget": "", "target_model": "", "tasks": "", "gate": ""}
    asked = {"accelerator_type": "nvidia.com/gpu", "accelerator_count": 0, "memory": "4Gi"}
    proved = {"converted": chain.reference("convert"), "proof": at("verify"), "router_weights": at("warmup")}
    rest = {"base": at("evaluate/base-0"), "adapters": adapters}
    return {
        "adopt": Case(judge),
        "check": Case(
            {**sizes, **asked, "data": "", "source_model": "", "arms": "", "seeds": 0, "shards": 2, "config": demo},
        ),
        "compare": Case({**chosen, **rows, **found}, {"result": "compare"}),
        "convert": Case(judge, {"checkpoint": "convert"}),
        "evaluate": Case({**rows, **tuned, "adapters": at(f"finetune/{run}")}, {"evaluation": f"evaluate/{run}"}),
        "finetune": Case({**chosen, **tuned}, {"adapters": f"finetune/{run}"}),
        "finish": Case({"status": dsl.PipelineTaskFinalStatus("SUCCEEDED", "run", "pipeline", None, None)}),
        "gate": Case({"result": at("report"), "mode": "warn"}),
        "ingest": Case(
            {"data": str(chain.demo / "tiny" / "data"), "pool_digest": chain.checked["digests"]["pool"]},
            {"pool": "ingest"},
        ),
        "merge": Case({"shards": [at("route-1"), at("route-0")]}, {"router_data": "merge"}),
        "prepare": Case({**sizes, **asked, **routed, **rows, "settings": "top-nll", "seeds": 0, "config": demo}),
        "pretrain": Case(rows, {"checkpoint": "pretrain"}),
        "report": Case({**proved, **rows, **routed, **chosen, **rest, **found}, {"result": "report"}),
        "reuse": Case({"uri": at("merge"), "identity": mf.identity_of(at("merge"))}, {"output": "merge"}),
        "route": Case({**rows, **selector, "router_weights": at("warmup"), "shard": "1/2"}, {"router_data": "route-1"}),
        "select": Case(
            {**routed, **rows, "baseline_config": json.dumps(chain.config("baseline"))},
            {"selections": "baseline", "selections/selected": "select"},
        ),
        "upcycle": Case({**rows, "source": chain.reference("dense")}, {"checkpoint": "upcycle"}),
        "verify": Case({**judge, "converted": chain.reference("convert")}, {"proof": "verify"}),
        "warmup": Case({**rows, **selector}, {"router_weights": "warmup"}),
    }


class Alone:
    """One component at a time, in a work root of its own, so that it finds nothing finished."""

    def __init__(self, chain: Chain, folder: Path) -> None:
        self.chain = chain
        self.work = folder / "work"
        self.out = folder / "out"

    def arguments(self, component: Any) -> dict[str, Any]:
        """What the component takes; of artifacts the folders."""
        common: dict[str, Any] = {
            "config": json.dumps(self.chain.config(component.name)),
            "code": "the program",
            "plan": "the plan",
            "work_root": str(self.work),
            "model_root": str(self.work / "models"),
            "accelerator": "",
            "accelerators": "0",
            "memory": "4Gi",
        }
        given = common | cases(self.chain)[component.name].given
        return {name: given[name] for name in component.component_spec.inputs}

    def in_process(self, component: Any, **changes: Any) -> dict[str, Any]:
        """Call the component's function as it stands; its outputs by their names."""
        spec = component.component_spec
        arguments = self.arguments(component) | changes
        for name, entry in artifacts(spec.inputs).items():
            paths = arguments[name]
            one = isinstance(paths, str)
            arguments[name] = entry(uri=paths) if one else [entry(uri=path) for path in paths]
        outputs = {name: kind(name=name, uri=str(self.out / name)) for name, kind in artifacts(spec.outputs).items()}
        self.out.mkdir()
        with environment():
            returned = component.python_func(**arguments, **outputs)
        names = [name for name in spec.outputs or {} if name not in outputs]
        outputs |= dict(zip(names, returned or (), strict=True))
        self._check(component, {name: self.out / name for name in outputs}, outputs)
        return outputs

    def locally(self, component: Any, **changes: Any) -> dict[str, Any]:
        """Let KFP's local runner execute it in a process of its own, its artifacts imported."""
        arguments = self.arguments(component) | changes
        kinds = artifacts(component.component_spec.inputs)
        task = self.execute(
            pipeline(component, arguments, kinds) if kinds else component, **({} if kinds else arguments)
        )
        names = component.component_spec.outputs or {}
        outputs = {name: task.outputs[name] for name in names if name not in artifacts(names) and not kinds}
        places = {name: path for name in names for path in self.out.glob(f"*/{component.name}/{name}")}
        self._check(component, places, outputs)
        return places | outputs

    def execute(self, what: Any, **arguments: Any) -> Any:
        """Run a component or a pipeline with KFP's local runner."""
        with environment():
            runner = local.SubprocessRunner(use_venv=False)
            local.init(runner, pipeline_root=str(self.out), raise_on_error=True)
            return what(**arguments)

    def _check(self, component: Any, places: dict[str, Path], outputs: dict[str, Any]) -> None:
        """What was written is what the chain wrote, and a checkpoint lies where its reference says."""
        for output, stage in cases(self.chain)[component.name].writes.items():
            name, _, below = output.partition("/")
            large = name == "checkpoint"  # the artifact holds the manifest alone
            made = mf.read_manifest(places[name] / below, verify=not large)
            assert made.identity == mf.read_manifest(self.chain.path(stage)).identity, output
        if model := outputs.get("model"):
            reference = Reference(**json.loads(model))
            assert mf.read_manifest(reference.uri).identity == reference.digest


def artifacts(entries: Any) -> dict[str, Any]:
    """The artifacts among a component's inputs or outputs: name -> KFP's class."""
    kinds = {name: str(entry.type).split("@")[0] for name, entry in (entries or {}).items()}
    return {n: getattr(dsl, kind.removeprefix("system.")) for n, kind in kinds.items() if kind.startswith("system.")}


def pipeline(component: Any, arguments: dict[str, Any], kinds: dict[str, Any]) -> Any:
    """The component alone in a pipeline, every artifact imported from its folder."""

    @dsl.pipeline(name=f"alone-{component.name}")
    def alone():  # type: ignore[no-untyped-def]  # KFP reads annotations as objects, and here they are text
        given = dict(arguments)
        for name, kind in kinds.items():
            paths = arguments[name]
            if isinstance(paths, str):
                given[name] = dsl.importer(artifact_uri=paths, artifact_class=kind).output
            else:
                with dsl.ParallelFor(paths, name=name) as path:
                    one = dsl.importer(artifact_uri=path, artifact_class=kind)
                given[name] = dsl.Collected(one.output)
        component(**given)

    return alone
