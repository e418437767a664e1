"""The whole pipeline on this machine: what `make run` and `make down` call.

    python -m pipelines.local run [preset=quick] [data=rows.jsonl] [key=value ...]
    python -m pipelines.local run runner=docker image=select-moe:dev [key=value ...]
    python -m pipelines.local down

`run` checks the configuration in this process (a mistake is said in one line, before anything starts), starts a real
S3 server and a real MLflow server or finds them again, and executes the KFP pipeline with KFP's local runner, its
cache on. Everything lies below `.selectmoe/` (or `SELECTMOE_STATE`); a run that was killed goes on where it was.
With `runner=docker` every task runs in a container of that image (pipelines/containers.py).
KFP's own chatter goes to `.selectmoe/run.log`; the screen shows what the stages say.
"""

from __future__ import annotations

import builtins
import contextlib
import fcntl
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipelines.screen import Screen
from selectmoe.entry import at_stage, ending, enter
from selectmoe.errors import UserError
from selectmoe.progress import quiet

STATE = "SELECTMOE_STATE"
ALWAYS = ("check", "finish")
"""Tasks that are never cached."""
WHOLE_NUMBERS = ("seeds", "shards", "accelerator.count")
"""Settings that are parameters of the pipeline, and numbers there."""


def state_folder() -> Path:
    """Where servers, cache, work and models lie: `SELECTMOE_STATE`, else `.selectmoe` in the working directory."""
    return Path(os.environ.get(STATE, "") or ".selectmoe").resolve()


def run(overrides: list[str]) -> int:
    """Check, start the servers, execute the pipeline, say what came of it.

    Args:
        overrides: `key=value` settings of `selectmoe run`; `runner=docker image=NAME` for tasks in containers.

    Returns:
        The exit code: 0, or that of the stage that failed.

    Raises:
        UserError: the configuration is wrong, a port is taken, or another run is under way here.
    """
    from pipelines import servers
    from selectmoe import check

    started = time.monotonic()
    state = state_folder()
    image, overrides = _image(overrides)
    arguments = _pipeline_arguments(overrides, state)
    config = _compose(arguments, state)
    servers.check_ports(state)
    config.mlflow.required = False  # ours is started next; where it was asked for, the pipeline's own `check` proves it
    if config.dry_run:
        check.preview(config)
        return 0
    plan, up = _ready(config, state)
    arguments["data"] = config.data  # the preset's rows and model are on disk now
    arguments["source_model"] = config.source_model
    with _alone(state):
        from components import _plan
        from selectmoe import journal, previews, runlog, sending, tracking
        from selectmoe.config import values

        _environment(state, up["mlflow"].url)
        key = _plan.plan_key(plan)
        settings = values(config, "identity", "execution", "input")
        work_root = arguments["work_root"]
        parent = sending.start_parent(f"{arguments['preset']} {key[:8]}", settings, work_root, key)
        os.environ[journal.PARENT] = parent
        os.environ[previews.SHOW_TEXT] = str(config.report.show_text).lower()
        events = state / "events.jsonl"
        events.unlink(missing_ok=True)
        os.environ["SELECTMOE_EVENTS"] = str(events)
        os.environ[runlog.RUN] = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        with sending.sending(work_root):
            os.environ[sending.DEFER] = "1"  # for the tasks: importing mlflow takes seconds in each
            with _tasks(image, state, arguments, config, events) as tasks:
                succeeded = _execute(state, arguments, tasks)
            executed, failure = _read_events(events)
            succeeded = succeeded and failure is None  # KFP takes a container that is gone too soon for a success
            found = runlog.result(work_root, key)
            result = Path(found["report"]) if found else None
            tags = {} if result is None else sending.verdict_tags(result)
            for output in reversed(_lineage(result) if result is not None else []):  # the report last
                sending.submit(output, work_root)
            sending.finish_parent(parent, work_root, failed=not succeeded, tags=tags)
        page = tracking.address(parent) or f"not complete: selectmoe sync {work_root}"
    if not succeeded or result is None:
        name, code, message = failure or ("the pipeline", 1, "see the lines above")
        print(f"selectmoe: {name} failed: {message} (log: {state / 'run.log'}; run: {page})", file=sys.stderr)
        if result is not None:
            print(f"report: {result / 'report.html'}", file=sys.stderr)
        return code
    _say(executed, _expected(plan), time.monotonic() - started, tags["sentence"], result, page)
    return 0


def _ready(config: Any, state: Path) -> tuple[Any, dict[str, Any]]:
    """What is to be done, and the servers, which start while the demo is written and files are digested."""
    from pipelines import servers
    from selectmoe import check

    with ThreadPoolExecutor(1) as beside:
        starting: list[Future[dict[str, Any]]] = []
        plan = check.plan(config, proved=lambda: starting.append(beside.submit(servers.start, state)))
        return plan, starting[0].result()


def down() -> int:
    """Stop the servers that `run` started; nothing else."""
    from pipelines import servers

    names = servers.stop(state_folder())
    print(f"stopped: {', '.join(names)}" if names else "nothing was up")
    return 0


def _image(overrides: list[str]) -> tuple[str, list[str]]:
    """The image that the tasks run in (empty: they are processes), and the other settings."""
    own = dict(item.split("=", 1) for item in overrides if item.startswith(("runner=", "image=")))
    kind, image = own.get("runner", "process"), own.get("image", "")
    if kind not in ("process", "docker") or (kind == "docker") != bool(image):
        raise UserError(f"runner={kind} image={image}: known are runner=process and runner=docker image=NAME")
    if image:
        from pipelines import containers

        containers.prove(image)
    return image, [item for item in overrides if not item.startswith(("runner=", "image="))]


def _pipeline_arguments(overrides: list[str], state: Path) -> dict[str, Any]:
    """The pipeline's parameters: what `selectmoe run` calls the same goes there, the rest through `config`."""
    from components._plan import PARAMETERS
    from selectmoe.cli import refuse_credentials

    refuse_credentials(overrides)
    named = {key: parameter for parameter, key in PARAMETERS.items()}
    arguments: dict[str, Any] = {"preset": "quick", "work_root": str(state / "work")}
    rest = []
    for item in overrides:
        key, sign, value = item.partition("=")
        if not sign:
            raise UserError(f"{item!r} is not of the form key=value (selectmoe run --help)")
        if key in WHOLE_NUMBERS:
            if not value.isdigit():
                raise UserError(f"{item} must be a whole number")
            arguments[named[key]] = int(value)
        elif key in named:
            arguments[named[key]] = value.strip("[]") if named[key] in ("arms", "tasks") else value
        elif key == "model_root" and "://" not in value:
            rest.append(f"{key}={Path(value).resolve()}")
        else:
            rest.append(item)
    half = max(1, len(os.sched_getaffinity(0)) // 2)  # KFP's local runner does two of the loop's tasks at a time
    keys = {item.partition("=")[0] for item in rest}
    own: dict[str, Any] = {"finetune.threads": half, "evaluate.threads": half}
    own |= {"demo_dir": state / "demo", "model_root": state / "models"}
    own["mlflow.required"] = "false"  # it is started here: to prove it again would take longer than a second run
    rest += [f"{key}={value}" for key, value in own.items() if key not in keys]
    for key in ("data", "work_root", "source_model", "target_model"):
        value = arguments.get(key, "")
        elsewhere = "://" in value or (key.endswith("_model") and not Path(value).exists())
        if value and not elsewhere:
            arguments[key] = str(Path(value).resolve())
    return arguments | {"config": rest}


def _compose(arguments: dict[str, Any], state: Path) -> Any:
    from components import _plan

    given = {key: value for key, value in arguments.items() if key != "config"}
    return _plan.compose(given, arguments["config"], str(state / "run"))[0]


@contextlib.contextmanager
def _alone(state: Path) -> Iterator[None]:
    state.mkdir(parents=True, exist_ok=True)
    with open(state / "run.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is under way in {state}: wait for it, or set {STATE} to a folder") from None
        yield


def _environment(state: Path, mlflow: str) -> None:
    """What the tasks' processes inherit."""
    root = str(Path(__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH", "")])])
    os.environ["MLFLOW_TRACKING_URI"] = mlflow
    mute = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "PYTHONUNBUFFERED": "1",
    }
    os.environ.update(mute)


@contextlib.contextmanager
def _tasks(image: str, state: Path, arguments: dict[str, Any], config: Any, events: Path) -> Iterator[Any]:
    """KFP's runner of tasks: processes of this machine, or containers, of which none outlives the run."""
    if not image:
        from kfp import local

        yield local.SubprocessRunner(use_venv=False)
        return
    from pipelines import containers

    os.environ["SELECTMOE_IMAGE"] = image  # what the components are compiled with
    events.touch()
    read = [arguments["data"], config.source_model, config.target_model]
    places = containers.places(state, arguments["work_root"], config.model_root, read, events)
    containers.share((*places.written, state / "kfp", state / "workspace"))
    containers.end(state)  # what a killed run has left
    with ending(lambda: containers.end(state)):
        yield containers.runner(image, places)


def _execute(state: Path, arguments: dict[str, Any], runner: Any) -> bool:
    """Run the pipeline with KFP's local runner; whether every task did its work."""
    from kfp import local

    from pipelines.select_moe.pipeline import select_moe

    local.init(
        runner,
        pipeline_root=str(state / "kfp"),
        workspace_root=str(state / "workspace"),
        enable_caching=True,
        cache_root=str(state / "cache"),
    )
    with open(state / "run.log", "a", encoding="utf-8") as log:
        screen = Screen(sys.stdout, log)
        plain = builtins.print
        with contextlib.redirect_stdout(screen):
            try:
                select_moe(**arguments)
            except RuntimeError as error:  # KFP's only sign that a task failed
                log.write(f"{error}\n")
                return False
            finally:
                builtins.print = plain  # KFP replaces it while a task runs; two at a time leave theirs behind
    return True


def _read_events(path: Path) -> tuple[Counter[str], tuple[str, int, str] | None]:
    """What was really executed (a cached task writes nothing), and which task failed first."""
    executed: Counter[str] = Counter()
    failure = None
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for entry in map(json.loads, lines):
        if "exit" in entry:
            failure = failure or (entry["stage"], entry["exit"], entry["message"])
        else:
            executed[entry["stage"]] += 1
    return executed, failure


def _expected(plan: Any) -> Counter[str]:
    arms = len(plan.arm_seeds)
    judge = {"upcycle": "upcycle", "pretrain": "pretrain"}.get(plan.judge, "adopt")
    single = [
        "check",
        "ingest",
        judge,
        "convert",
        "verify",
        "warmup",
        "merge",
        "select",
        "report",
        "gate",
    ]
    return Counter(single) + Counter(route=plan.shards, finetune=arms, evaluate=arms + 1)


def _lineage(result: Path) -> list[Path]:
    """The report's folder and every output that it rests on, as the manifests name them."""
    from selectmoe import manifest

    found: dict[Path, None] = {}
    waiting = [result]
    while waiting:
        path = waiting.pop()
        if path in found or not (path / manifest.NAME).is_file():
            continue
        found[path] = None
        for entry in manifest.read_manifest(path, verify=False).inputs.values():
            waiting += [Path(uri) for uri in re.split(r" (?=/)", entry["uri"])]
    return list(found)


def _say(
    executed: Counter[str], expected: Counter[str], seconds: float, sentence: str, result: Path, page: str
) -> None:
    ran = [f"{name} x{n}" if n > 1 else name for name, n in executed.items() if name not in ALWAYS]
    cached = expected - executed
    if not ran:
        print(f"\nall stages came from the cache ({seconds:.0f} s)")
    else:
        kept = ", ".join(f"{name} x{n}" if n > 1 else name for name, n in cached.items())
        print(f"\nexecuted: {', '.join(ran)} ({seconds:.0f} s); from the cache: {kept or 'none'}")
    print(f"verdict: {sentence}")
    print(f"report:  {result / 'report.html'}")
    print(f"MLflow:  {page}")
    print("The servers stay up for browsing; `make down` stops them.")


def main(arguments: list[str]) -> int:
    """The command line; exit codes as in docs/design.md, "Errors"."""
    quiet()
    return enter("selectmoe", lambda: _dispatch(arguments))


def _dispatch(arguments: list[str]) -> int:
    if arguments[:1] == ["run"]:
        with at_stage("pipeline", log=state_folder() / "error.log"):
            return run(arguments[1:])
    if arguments == ["down"]:
        return down()
    raise UserError("usage: python -m pipelines.local run [key=value ...] | down")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
