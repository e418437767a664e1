"""Compile the pipelines for a site.

    python -m pipelines compile                                    # what is committed: for development
    python -m pipelines compile pipeline=select_moe profile=site.yaml image=NAME@sha256:DIGEST output=pipeline.yaml

`python -m pipelines submit` runs one on a cluster (`pipelines/submit.py`).

Without `output=` the files are written where they are committed: `pipelines/NAME/pipeline.yaml`, and the README of
every pipeline and component, made from its docstring and its signature. What is compiled has been read by KFP's own
schema.
"""

import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from pipelines.profile import DEVELOPMENT, Profile, load
from selectmoe.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PIPELINES = ("select_moe", "sweep")
KEYS = ("pipeline", "profile", "image", "development", "output")


def compile_pipeline(name: str, profile: Profile, target: Path) -> Path:
    """Compile one pipeline for a site; the same source and profile give the same bytes.

    Args:
        name: one of `PIPELINES`.
        profile: of the site.
        target: the YAML file to write.

    Returns:
        The file.
    """
    return _write(importlib.import_module(f"pipelines.{name}.pipeline").Graph(profile).pipeline, target)


def _write(pipeline: Any, target: Path) -> Path:
    from kfp import compiler

    target.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(pipeline, str(target))
    validate(target)
    return target


def validate(path: Path) -> None:
    """Read a compiled pipeline by KFP's protobuf schemas: the pipeline, and what Kubernetes is told of every task.

    Raises:
        ParseError: (of protobuf) a field that the schema does not have, or of another type.
    """
    import yaml
    from google.protobuf import json_format
    from kfp.kubernetes import kubernetes_executor_config_pb2 as k8s
    from kfp.pipeline_spec import pipeline_spec_pb2 as schema

    spec, *platforms = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    json_format.ParseDict(spec, schema.PipelineSpec())
    for document in platforms:
        json_format.ParseDict(document, schema.PlatformSpec())
        for config in document["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
            json_format.ParseDict(config, k8s.KubernetesExecutorConfig())


def compile_all(root: Path = ROOT) -> list[Path]:
    """Write everything that is committed and generated from the components and the pipelines.

    Args:
        root: folder below which the files are written.

    Returns:
        The files, the pipelines first.
    """
    modules = {name: importlib.import_module(f"pipelines.{name}.pipeline") for name in PIPELINES}
    pipelines = {name: module.Graph(DEVELOPMENT).pipeline for name, module in modules.items()}
    written = [_write(item, root / "pipelines" / name / "pipeline.yaml") for name, item in pipelines.items()]
    pages = {f"pipelines/{name}": readme(item) for name, item in pipelines.items()}
    pages |= {f"components/{item.name}": readme(item) for module in modules.values() for item in module.COMPONENTS}
    for folder, text in pages.items():
        page = root / folder / "README.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")
        written.append(page)
    return written


def readme(item: Any) -> str:
    """The README of a KFP component or pipeline: what it does, what goes in, what comes out."""
    from docstring_parser import parse

    spec = item.component_spec
    function, file = (
        (item.python_func, "component.py") if hasattr(item, "python_func") else (item.pipeline_func, "pipeline.py")
    )
    documented = {p.arg_name: p.description for p in parse(function.__doc__).params}
    lines = [f"# {item.name}", "", f"<!-- Made by `python -m pipelines compile`; edit {file}. -->", ""]
    lines += [spec.description or "", ""]
    for title, entries in (("Inputs", spec.inputs or {}), ("Outputs", spec.outputs or {})):
        if entries:
            given = any(entry.default is not None for entry in entries.values() if hasattr(entry, "default"))
            columns = ["name", "type", *(["default"] if given else []), "what"]
            lines += [f"## {title}", "", _row(columns), "|" + "---|" * len(columns)]
            for name, entry in entries.items():
                default = [_default(entry)] if given else []
                what = _cell(entry.description or documented.get(name))
                lines.append(_row([f"`{name}`", _type(entry), *default, what]))
            lines.append("")
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _default(entry: Any) -> str:
    return "none: must be given" if entry.default is None else f"`{json.dumps(entry.default)}`"


def _type(entry: Any) -> str:
    kind = str(entry.type).split("@")[0].removeprefix("system.")
    return f"list of {kind}" if getattr(entry, "is_artifact_list", False) else kind


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def _given(arguments: list[str]) -> dict[str, str]:
    given = {}
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if not sign or key not in KEYS:
            raise UserError(f"{argument!r} is not understood: compile takes {', '.join(f'{k}=' for k in KEYS)}")
        given[key] = value
    return given


def compile_for_a_site(given: dict[str, str]) -> Path:
    """Compile as the command line says.

    Args:
        given: pipeline, profile (file), image, development (true or false), output (file).

    Raises:
        UserError: an unknown pipeline, a profile that is wrong, or an image without a digest.
    """
    name = given.get("pipeline", PIPELINES[0])
    if name not in PIPELINES:
        raise UserError(f"pipeline={name} is unknown; known: {', '.join(PIPELINES)}")
    if given.get("development", "false") not in ("true", "false"):
        raise UserError(f"development={given['development']} must be true or false")
    if "output" not in given:
        raise UserError("output= is missing: where the pipeline for this site is to be written")
    changes: dict[str, Any] = {"image": given["image"]} if "image" in given else {}
    if "development" in given:
        changes["development"] = given["development"] == "true"
    if "profile" in given:
        profile = load(given["profile"], **changes)
    else:
        profile = dataclasses.replace(Profile(), **changes)
        profile.validate()
    return compile_pipeline(name, profile, Path(given["output"]))


def main(arguments: list[str]) -> int:
    """The command line; exit code 2 where it is not understood."""
    if arguments[:1] == ["submit"]:
        from pipelines import submit

        return submit.main(arguments[1:])
    if arguments[:1] == ["trainjob"]:
        from pipelines import trainjob

        return trainjob.main(arguments[1:])
    try:
        if arguments[:1] != ["compile"]:
            raise UserError(
                f"usage: python -m pipelines compile [{'= '.join(KEYS)}=] | submit ... | trainjob ... (submit --help)"
            )
        given = _given(arguments[1:])
        print(compile_for_a_site(given) if given else compile_all()[0])
    except UserError as error:
        print(f"pipelines: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
