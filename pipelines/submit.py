"""Run the compiled pipeline on a cluster.

    python -m pipelines submit endpoint=http://localhost:8888 profile=site.yaml work_root=s3://bucket/work
    python -m pipelines submit endpoint=http://localhost:8888 run_id=ID
    python -m pipelines submit --help

Compile -> check the parameters against what was compiled -> find or upload the version, which is named by the digest of
its YAML -> start the run in an experiment -> follow it. Submitting twice uploads once; a run is never started twice for
one command. The run's ID is the last line on stdout; progress and errors go to stderr.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.follow import RunFailed, follow
from pipelines.kfp_api import Server, Unavailable, find_endpoint
from selectmoe.errors import Refused, UserError

FLAGS = {"--dry-run": "dry_run=true", "--wait": "wait=true", "--no-wait": "wait=false"}
SECRET_WORD = re.compile(r"(password|passwd|secret|api_?key|access_?key|credential)[\w.]*\s*[=:]", re.IGNORECASE)
SECRET_URI = re.compile(r"://[^/\s]*@")


def _option(default: str | bool, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Options:
    """What `submit` itself takes; everything else is a parameter of the pipeline."""

    endpoint: str = _option("", "URL of the KFP API; default KF_PIPELINES_ENDPOINT, in a pod the cluster's own")
    namespace: str = _option("", "namespace of a Kubeflow with several users; in a pod its own")
    profile: str = _option("", "YAML of the site (pipelines/profile.py); default the one for development")
    experiment: str = _option("Default", "KFP experiment of the run")
    create_experiment: bool = _option(False, "make the experiment where there is none")
    run_name: str = _option("", "name of the run; default the pipeline's name and the time")
    service_account: str = _option("", "Kubernetes service account of the run's pods; default the server's")
    token_file: str = _option("", "file with a bearer token; default KF_PIPELINES_TOKEN, in a pod its own token")
    ca_file: str = _option("", "certificates that vouch for the endpoint; default the public ones")
    wait: bool = _option(True, "follow the run to its end; false: start it and go")
    dry_run: bool = _option(False, "print what would be sent, and send nothing (also --dry-run)")
    run_id: str = _option("", "follow this run instead of starting one")


@dataclass(frozen=True)
class Compiled:
    """The compiled pipeline: its YAML, the pipeline's part of it, and the version's name."""

    text: bytes
    spec: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The pipeline's name."""
        return str(self.spec["pipelineInfo"]["name"])

    @property
    def version(self) -> str:
        """The version's name: the digest of the YAML."""
        return hashlib.sha256(self.text).hexdigest()[:16]

    @property
    def parameters(self) -> Mapping[str, Mapping[str, Any]]:
        """The pipeline's parameters: name -> type, default, description."""
        return dict(self.spec["root"].get("inputDefinitions", {}).get("parameters", {}))


def compiled(profile: str = "") -> Compiled:
    """Compile the pipeline as `python -m pipelines compile` does.

    Args:
        profile: YAML of the site; empty: the profile for development.
    """
    import yaml

    from pipelines.__main__ import compile_pipeline
    from pipelines.profile import DEVELOPMENT, load

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "pipeline.yaml")
        compile_pipeline("select_moe", load(profile) if profile else DEVELOPMENT, target)
        text = target.read_bytes()
    return Compiled(text, next(yaml.safe_load_all(text)))


def parse(arguments: Sequence[str], known: Mapping[str, Mapping[str, Any]]) -> tuple[Options, dict[str, Any]]:
    """Read the words of the command.

    A word that is both an option and a parameter (`experiment`) counts as both.

    Args:
        arguments: `key=value` words and flags.
        known: the pipeline's parameters.

    Returns:
        The options, and the parameters with the types that the pipeline wants.

    Raises:
        UserError: an unknown word, a value of the wrong type, a required parameter missing, or what looks like a
            credential.
    """
    names = {f.name: f for f in dataclasses.fields(Options)}
    options: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    for word in (FLAGS.get(argument, argument) for argument in arguments):
        key, sign, value = word.partition("=")
        if not sign or key.startswith("-"):
            raise UserError(f"{word!r} is not of the form key=value (python -m pipelines submit --help)")
        if key not in names and key not in known:
            near = difflib.get_close_matches(key, [*known, *names], n=3, cutoff=0.5) or list(known)
            raise UserError(f"the pipeline has no parameter {key!r}; nearest: {', '.join(near)} (--help lists all)")
        if SECRET_WORD.search(word) or SECRET_URI.search(value):
            raise UserError(f"{key}= looks like a credential: those belong into a Kubernetes secret, not into a run")
        if key in names:
            options[key] = typed(key, value, "BOOLEAN" if isinstance(names[key].default, bool) else "STRING")
        if key in known:
            parameters[key] = typed(key, value, str(known[key]["parameterType"]))
    if not options.get("run_id"):
        required = [n for n, p in known.items() if not p.get("isOptional") and "defaultValue" not in p]
        missing = [name for name in required if name not in parameters]
        if missing:
            raise UserError(f"the pipeline needs {', '.join(f'{name}=' for name in missing)}")
    elif parameters and not set(parameters) <= set(names):
        raise UserError(f"run_id= follows a run that has its parameters already: leave out {', '.join(parameters)}")
    return Options(**options), parameters


def typed(key: str, value: str, kind: str) -> Any:
    """A word's value in the type of KFP's own name; lists and mappings are written as Hydra has them.

    Args:
        key: what the error calls it.
        value: as it was typed.
        kind: STRING, NUMBER_INTEGER, NUMBER_DOUBLE, BOOLEAN, LIST or STRUCT.

    Raises:
        UserError: the value is not of that type.
    """
    wanted = {
        "NUMBER_INTEGER": "a whole number",
        "NUMBER_DOUBLE": "a number",
        "BOOLEAN": "true or false",
        "LIST": "a list: [a,b], with quotes around an item that holds = or a bracket",
        "STRUCT": "a mapping: {a:1,b:2}",
    }
    if kind == "STRING":
        return value
    if kind not in wanted:
        raise UserError(f"{key}= is of KFP's type {kind}, which a command cannot give")
    read: Any = _hydra(value)
    fits = {
        "NUMBER_INTEGER": isinstance(read, int) and not isinstance(read, bool),
        "NUMBER_DOUBLE": isinstance(read, int | float) and not isinstance(read, bool) and abs(read) < float("inf"),
        "BOOLEAN": isinstance(read, bool),
        "LIST": isinstance(read, list),
        "STRUCT": isinstance(read, dict),
    }
    if not fits[kind]:
        raise UserError(f"{key}={value} must be {wanted[kind]}")
    return read


def _hydra(value: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(f"value={value}").value()
    except HydraException:
        return None


def body(pipeline: Compiled, options: Options, parameters: Mapping[str, Any], ids: Mapping[str, str]) -> Any:
    """The run as the server wants it (`V2beta1Run`).

    Args:
        pipeline: the compiled pipeline.
        options: name and service account of the run.
        parameters: the pipeline's parameters, those that are not left to their defaults.
        ids: `experiment_id`, `pipeline_id`, `pipeline_version_id`.
    """
    import kfp_server_api as api

    version = {key: ids[key] for key in ("pipeline_id", "pipeline_version_id")}
    return api.V2beta1Run(
        display_name=options.run_name or f"{pipeline.name} {time.strftime('%Y-%m-%d %H-%M-%S')}",
        experiment_id=ids["experiment_id"],
        pipeline_version_reference=api.V2beta1PipelineVersionReference(**version),
        runtime_config=api.V2beta1RuntimeConfig(parameters=dict(parameters)),
        service_account=options.service_account or None,
    )


def dry_run(pipeline: Compiled, options: Options, parameters: Mapping[str, Any]) -> str:
    """What would be sent, as JSON; IDs that the server gives are shown as <...>."""
    import kfp_server_api as api

    ids = {name: f"<{name}>" for name in ("experiment_id", "pipeline_id", "pipeline_version_id")}
    run = api.ApiClient().sanitize_for_serialization(body(pipeline, options, parameters, ids))
    upload = {"name": pipeline.version, "pipeline": pipeline.name, "bytes": len(pipeline.text)}
    experiment = {"display_name": options.experiment, "create": options.create_experiment}
    asked = {"endpoint": options.endpoint and find_endpoint(options.endpoint), "namespace": options.namespace}
    return json.dumps({**asked, "experiment": experiment, "upload_unless_there": upload, "run": run}, indent=2)


def register(pipeline: Compiled, server: Server) -> dict[str, str]:
    """Find or upload the version of a compiled pipeline, and say which it was.

    Returns:
        `pipeline_id`, `pipeline_version_id`.

    Raises:
        UserError: the server refuses.
        Unavailable: the server does not answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, f"{pipeline.name}.yaml")
        package.write_bytes(pipeline.text)
        pipeline_id, version_id, uploaded = server.version(pipeline.name, pipeline.version, package)
    print(f"{pipeline.name} {pipeline.version}: {'uploaded' if uploaded else 'there already'}", file=sys.stderr)
    return {"pipeline_id": pipeline_id, "pipeline_version_id": version_id}


def submit(
    options: Options, pipeline: Compiled, parameters: Mapping[str, Any], server: Server, once: bool = False
) -> str:
    """Start a run.

    Args:
        options: experiment, name, service account.
        pipeline: the compiled pipeline.
        parameters: its parameters.
        server: where.
        once: only where the experiment has no run of that name yet.

    Returns:
        The run's ID.

    Raises:
        UserError: the experiment is not there, or the server refuses.
        Unavailable: the server does not answer.
    """
    experiment_id = server.experiment(options.experiment, options.create_experiment)
    run = body(pipeline, options, parameters, {"experiment_id": experiment_id, **register(pipeline, server)})
    return server.only(run) if once else server.start(run)


def usage(pipeline: Compiled) -> str:
    """The text of `python -m pipelines submit --help`."""
    lines = ["usage: python -m pipelines submit key=value ...", "", "options:"]
    for option in dataclasses.fields(Options):
        default = json.dumps(option.default) if isinstance(option.default, bool) else option.default or "none"
        lines.append(f"  {option.name}\n      {option.metadata['doc']} [default {default}]")
    lines += ["", f"parameters of the pipeline {pipeline.name}:"]
    for name, entry in pipeline.parameters.items():
        default = json.dumps(_default(entry)) if "defaultValue" in entry else "required"
        lines.append(f"  {name}\n      {' '.join(str(entry.get('description', '')).split())} [{default}]")
    lines += ["", "exit codes: 0 succeeded, 1 the run failed or the server is away, 2 your input, 3 the gate said no"]
    return "\n".join(lines)


def _default(entry: Mapping[str, Any]) -> Any:
    """A parameter's default; the compiled pipeline writes whole numbers as fractions."""
    value = entry["defaultValue"]
    return int(value) if entry["parameterType"] == "NUMBER_INTEGER" else value


def _again(options: Options, run_id: str) -> str:
    """The command that follows a run again."""
    kept = {name: getattr(options, name) for name in ("endpoint", "namespace", "token_file", "ca_file")}
    words = [f"{name}={value}" for name, value in kept.items() if value]
    return shlex.join(["python", "-m", "pipelines", "submit", *words, f"run_id={run_id}"])


def command(arguments: Sequence[str]) -> None:
    """Do what the command line says.

    Raises:
        UserError, Refused, RunFailed, Unavailable: see `main`.
    """
    profiles = [word.partition("=")[2] for word in arguments if word.startswith("profile=")]
    pipeline = compiled(*profiles[-1:])
    if {"--help", "-h"} & set(arguments):
        print(usage(pipeline))
        return
    options, parameters = parse(arguments, pipeline.parameters)
    if options.dry_run:
        print(dry_run(pipeline, options, parameters))
        return
    server = Server(options.endpoint, options.namespace, options.token_file, options.ca_file)
    run_id = str(server.run(options.run_id).run_id) if options.run_id else submit(options, pipeline, parameters, server)
    print(f"run: {server.link(run_id)}", file=sys.stderr)
    print(run_id, flush=True)
    if not options.wait:
        print(f"follow it: {_again(options, run_id)}", file=sys.stderr)
        return
    try:
        follow(server, run_id)
    except KeyboardInterrupt:
        print(f"\nthe run goes on; follow it again: {_again(options, run_id)}", file=sys.stderr)
        raise
    print("succeeded", file=sys.stderr)


def main(arguments: Sequence[str]) -> int:
    """The command line of `python -m pipelines submit`.

    Returns:
        0 the run succeeded (or was started, or nothing was to be sent), 1 it failed or the server is away, 2 the
        user's input, 3 the gate said no, 130 interrupted: the run goes on.
    """
    codes = {UserError: 2, Refused: 3, RunFailed: 1, Unavailable: 1}
    try:
        command(arguments)
    except tuple(codes) as error:
        print(f"pipelines submit: {' '.join(str(error).split())}", file=sys.stderr)
        return codes[type(error)]
    except KeyboardInterrupt:
        return 130
    return 0
