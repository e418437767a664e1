"""Compile the pipeline: `python -m pipelines compile` writes `pipelines/select_moe/pipeline.yaml` and the READMEs.

`python -m pipelines submit` runs it on a cluster (`pipelines/submit.py`).

The README of a component is made from its docstring and its signature, as `components/NAME/README.md`.
"""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path("pipelines/select_moe/pipeline.yaml")


def compile_all(root: Path = ROOT) -> list[Path]:
    """Write everything that is generated from the components and the pipeline; the same source gives the same bytes.

    Args:
        root: folder below which the files are written.

    Returns:
        The files, the pipeline first.
    """
    from kfp import compiler

    from pipelines.select_moe.pipeline import COMPONENTS, select_moe

    target = root / TARGET
    target.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(select_moe, str(target))
    written = [target]
    for component in COMPONENTS:
        page = root / "components" / component.name / "README.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(readme(component), encoding="utf-8")
        written.append(page)
    return written


def readme(component: Any) -> str:
    """The README of a KFP component: what it does, what goes in, what comes out."""
    from docstring_parser import parse

    spec = component.component_spec
    documented = {p.arg_name: p.description for p in parse(component.python_func.__doc__).params}
    lines = [f"# {component.name}", "", "<!-- Made by `python -m pipelines compile`; edit component.py. -->", ""]
    lines += [spec.description or "", ""]
    for title, entries in (("Inputs", spec.inputs or {}), ("Outputs", spec.outputs or {})):
        if entries:
            lines += [f"## {title}", "", "| name | type | what |", "|---|---|---|"]
            for name, entry in entries.items():
                lines.append(f"| `{name}` | {_type(entry)} | {_cell(entry.description or documented.get(name))} |")
            lines.append("")
    return "\n".join(lines)


def _type(entry: Any) -> str:
    kind = str(entry.type).split("@")[0].removeprefix("system.")
    return f"list of {kind}" if getattr(entry, "is_artifact_list", False) else kind


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def main(arguments: list[str]) -> int:
    """The command line; exit code 2 where it is not understood."""
    if arguments[:1] == ["submit"]:
        from pipelines import submit

        return submit.main(arguments[1:])
    if arguments != ["compile"]:
        print("usage: python -m pipelines compile | submit ... (submit --help)", file=sys.stderr)
        return 2
    print(compile_all()[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
