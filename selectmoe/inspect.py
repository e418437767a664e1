"""What is in router data: a summary on the screen, plots, a page and a file of numbers.

    selectmoe inspect out/route/router_data
    selectmoe inspect router_data_dir=[out/route-0,out/route-1] output_dir=out/inspect

In: outputs of `route` (shards too) or `merge`, their `router_data/`, one dataset of them, or the predecessor's files and
folders. Out, in `inspect/` beside the router data unless `output_dir` is given: `inspect.html` (all of it, one file),
`inspect.json` (every number) and the plots as PNG: `gates` (distribution by source and layer), `experts` (use by layer),
`entropy`, `lengths`, `scores`, `work` (the slowest pieces). What a judge or a file does not have is left out.

Values, not verdicts: none of this says whether a selection will be a good one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selectmoe import inspect_data, inspect_tables, stage
from selectmoe import router_data as rd
from selectmoe.config import StageConfig, execution, input_
from selectmoe.errors import UserError
from selectmoe.manifest import NAME as MANIFEST

STAGE = "inspect"
VERSION = 1
NUMBERS, PAGE = "inspect.json", "inspect.html"


@dataclass
class InspectConfig(StageConfig):
    """Configuration of `inspect`."""

    router_data_dir: list[str] = input_(doc="router data, of one output or several; may be given without the key")
    output_dir: str = execution(doc="folder to write; default: inspect/ beside the router data of one whole output")

    def validate(self) -> None:
        """Check that there is something to look at.

        Raises:
            UserError: the list is empty.
        """
        if not self.router_data_dir:
            raise UserError("router_data_dir=[] is empty: name router data")


def words(arguments: Sequence[str]) -> list[str]:
    """What was typed as `key=value`: places without a key, and the default of output_dir.

    Raises:
        UserError: a place is no router data, is named in both ways, or output_dir is needed.
    """
    keys = [word for word in arguments if "=" in word]
    places = [word for word in arguments if "=" not in word]
    named = [word.partition("=")[2] for word in keys if word.startswith("router_data_dir=")]
    if named and places:
        raise UserError(f"{places[0]} and router_data_dir= both name router data: use one of them")
    keys = [word for word in keys if not word.startswith("router_data_dir=")]
    if not named and places:
        named = ["[" + ",".join("'" + place.replace("'", "\\'") + "'" for place in places) + "]"]
    elif named and not named[0].startswith("["):
        places, named = named, [f"[{named[0]}]"]
    if named and not any(word.startswith("output_dir=") for word in keys):
        keys.append(f"output_dir={beside(places)}")
    return [*(f"router_data_dir={value}" for value in named), *keys]


def beside(places: Sequence[str]) -> Path:
    """Where `inspect/` lies if nothing else is said.

    Raises:
        UserError: the place is no router data, or not a whole output, in or beside which it could lie.
    """
    if len(places) == 1:
        output = rd.locate(places[0], shard=True)
        if (output / MANIFEST).is_file() and (output / rd.FOLDER).is_dir():
            return output / STAGE
        if output.name == rd.FOLDER and output.is_dir():  # the predecessor's
            return output.parent / STAGE
    raise UserError("output_dir= is missing: name the folder to write (it has a default for one whole output only)")


def run(config: InspectConfig) -> Path:
    """Inspect router data.

    Returns:
        The output directory.

    Raises:
        UserError: something is no router data or damaged, or does not belong together.
    """
    config.validate()
    outputs = [rd.locate(place, shard=True) for place in config.router_data_dir]
    inputs = {"router_data": [str(output) for output in outputs]}
    with stage.begin(STAGE, VERSION, config, inputs=inputs) as out:
        if not out.done:
            from selectmoe import inspect_page, inspect_plots  # matplotlib

            found = inspect_data.read(outputs)
            numbers = inspect_data.numbers(found)
            plots = inspect_plots.draw(found, numbers)
            for name, png in plots.items():
                (out.staging / f"{name}.png").write_bytes(png)
            text = json.dumps(numbers, indent=1, allow_nan=False)
            (out.staging / NUMBERS).write_text(text + "\n", encoding="utf-8")
            (out.staging / PAGE).write_text(inspect_page.page(numbers, plots), encoding="utf-8")
            out.commit(rows_in=numbers["rows"], rows_out=numbers["rows"], bookkeeping=["*"])
    print(inspect_tables.summary(json.loads((out.path / NUMBERS).read_text(encoding="utf-8"))))
    return out.path
