"""The predecessor's stage 2 in ours: `selectmoe route`, then `selectmoe select`; what `scripts/run_stage_2.sh` calls.

    bash scripts/run_stage_2.sh model_checkpoint_path=outputs/stage_1_warmup/DATE/TIME/full_rank_weights.pt

Out, in `outputs/stage_2_selection/DATE/TIME/`: `router_data/` (ours, and `NAME_router_data.pt`), `selection/` (all that
`select` writes) and `selected_data.jsonl`, a link to the one in there. The keys of both stages go to the stage that has
them. Everything is checked before anything is started: what is wrong with the selection is said before hours of routing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from selectmoe import seed_commands
from selectmoe.config import leaves
from selectmoe.errors import UserError
from selectmoe.seed_commands import DATASETS, JUDGE, given, ingest, output_folder, torchrun

LOG = "stage_2.log"
SELECTION = "selection"
SCORES = {"legacy": "legacy", "observer": "answer"}
"""Recipe of stage 1 -> the score that goes with it."""


@dataclass
class Words:
    """What an old command means; `output_dir`, `data` (of select) and `router_data_dir` are added later."""

    route: dict[str, str]
    select: dict[str, str] | None
    """None: skip_data_selection."""
    name: list[str]
    """What names the folder beside the time."""
    debug: bool


def split(overrides: Sequence[str]) -> Words:
    """Give every key to the stage that has it, with the predecessor's defaults.

    Raises:
        UserError: there is no model_checkpoint_path, or a key would not be read.
    """
    from selectmoe.cli import config_class

    keys = given(overrides)
    if not keys.get("model_checkpoint_path"):
        raise UserError("model_checkpoint_path= is missing: name stage 1's full_rank_weights.pt, or its folder")
    if "router_data_dir" in keys:
        raise UserError("router_data_dir= is not read here, where rows are routed: give it to `selectmoe select`")
    name = [f"tag={keys.pop('tag')}"] if "tag" in keys else []
    debug, skip = (_boolean(keys, key) for key in ("debug_print", "skip_data_selection"))
    recipe = keys.pop("recipe", "legacy")
    if recipe not in SCORES:
        raise UserError(f"recipe={recipe!r} is unknown; known: {', '.join(SCORES)}")
    if "clustering_method" in keys:
        if "method" in keys:
            raise UserError("clustering_method= and method= are the same key: leave out one of them")
        keys["method"] = keys.pop("clustering_method")
    routing, selection = (_first_words(config_class(stage)) for stage in ("route", "select"))
    both = {key: value for key, value in keys.items() if key in ("seed", "threads", "work_root")}
    chosen = {key: value for key, value in keys.items() if key.split(".")[0] in selection - routing}
    if skip and chosen:
        raise UserError(f"{next(iter(chosen))} is not read with skip_data_selection=true: leave one of them out")
    route = {"selector_model.path": JUDGE, "export_legacy": "true"}
    if not {"data", "dataset.local.data_dir"} & {*keys}:
        route |= DATASETS
    route |= {key: value for key, value in keys.items() if key not in chosen}
    select = {"method": "kmeans", "score": SCORES[recipe]} | chosen
    if select["method"] == "kmeans":
        select = {"picking": "legacy", **select}
    return Words(route, None if skip else select | both, name, debug)


def _boolean(keys: dict[str, str], key: str) -> bool:
    value = keys.pop(key, "false")
    if value.lower() not in ("true", "false"):
        raise UserError(f"{key}={value} must be true or false")
    return value.lower() == "true"


def _first_words(cls: type) -> set[str]:
    return {leaf.name.split(".")[0] for leaf in leaves(cls)}


def stage_2(overrides: Sequence[str]) -> int:
    """Stage 2: route on every GPU, one process on a CPU where there is none; then select.

    Returns:
        The exit code of the stage that failed, else 0.

    Raises:
        UserError: what the stages themselves would refuse, as far as it can be known before.
    """
    from selectmoe.cli import compose, refuse_credentials

    refuse_credentials(overrides)
    words = split(overrides)
    _say_recipe(words)
    out = Path(words.route["output_dir"]) if "output_dir" in words.route else None
    place = {"output_dir": str(out or "outputs")}
    config = compose("route", _joined(words.route | place))
    if words.select is not None:
        unknown_yet = {"router_data_dir": "outputs", "data": "outputs", "output_dir": "outputs"}
        compose("select", _joined(words.select | unknown_yet))
    prove(config.model_checkpoint_path, config.selector_model.path, config.data)
    if not config.data:  # rows must be there before several processes read them
        words.route = {key: value for key, value in words.route.items() if not key.startswith("dataset.")}
        words.route["data"] = str(ingest(config.dataset, overrides))
    if out is None:
        out = output_folder("stage_2_selection", words.name)
        words.route["output_dir"] = str(out)
    processes = seed_commands.devices()
    launcher = torchrun(processes) if processes > 1 else []
    code = _run([*launcher, "selectmoe.cli", "route", *_joined(words.route)], out, out, words.debug)
    if code == 0 and words.select is not None:
        code = _select(words, out)
    if code == 0:
        print(out)
    return code


def prove(weights: str, judge: str, data: str) -> None:
    """Check the inputs as far as it takes no time.

    Raises:
        UserError: one is not there, or is something else.
    """
    from selectmoe import pool, route
    from selectmoe.checkpoint import resolve

    route.weights_input(weights)
    resolve(judge, ("select_moe",), "selector_model.path", "make one with `selectmoe convert`")
    if data:
        pool.locate(data)


def _say_recipe(words: Words) -> None:
    if words.select is not None:
        shown = " ".join(f"{key}={words.select[key]}" for key in ("score", "picking") if key in words.select)
        print(f"run_stage_2: selects with {shown}; ours would be recipe=observer picking=coverage", file=sys.stderr)


def _select(words: Words, out: Path) -> int:
    """Select into a folder inside, and name the rows beside `router_data/`, where they have always been."""
    from selectmoe.selection import CONFIG, FILE

    chosen = out / SELECTION
    paths = {"router_data_dir": str(out), "data": words.route["data"], "output_dir": str(chosen)}
    code = _run(["selectmoe.cli", "select", *_joined((words.select or {}) | paths)], out, chosen, words.debug)
    if code == 0:
        link = chosen / "logs" / FILE  # a reserved folder: nobody's result
        link.parent.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(f"{SELECTION}/{FILE}")
        os.replace(link, out / FILE)
        if words.debug:
            sys.stderr.write((chosen / CONFIG).read_text(encoding="utf-8"))
    return code


def _run(command: list[str], out: Path, result: Path, debug: bool) -> int:
    if debug:
        print(f"run_stage_2: {' '.join(command)}", file=sys.stderr)
    return seed_commands.logged([sys.executable, "-m", *command], out, LOG, result)


def _joined(keys: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in keys.items()]
