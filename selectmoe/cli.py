"""The command line: `selectmoe STAGE key=value ...`, composed by Hydra; exit codes as in docs/design.md, "Errors".

    selectmoe --help
    selectmoe route --help
    selectmoe run preset=quick output_dir=outputs/quick
    selectmoe select --cfg job router_data_dir=out/route data=out/ingest output_dir=out/select

The last line on stdout is the path of what was written. Nothing heavy is imported before it is known what to do.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_origin

from selectmoe import distributed
from selectmoe.entry import at_stage, enter
from selectmoe.errors import Refused, UserError
from selectmoe.progress import quiet

STAGES = {
    "check": "prove the prerequisites of a whole run and estimate it",
    "ingest": "datasets to a normalised pool and a clean holdout",
    "pretrain": "a small OLMoE of your own, to try things with",
    "upcycle": "a dense Llama-like checkpoint to an OLMoE-shaped one",
    "convert": "an OLMoE checkpoint to a Select-MoE one, every original tensor unchanged",
    "verify": "prove that the conversion changed nothing it should not",
    "warmup": "stage 1: train the quality gates (and routers)",
    "route": "stage 2: what gate and router say of every row",
    "merge": "put the shards of `route` together",
    "select": "choose rows",
    "baseline": "choose rows the other ways, to compare with",
    "finetune": "stage 3: LoRA on the chosen rows",
    "evaluate": "stage 4: held-out loss and lm-eval tasks",
    "compare": "many selections side by side: planted rows, scores, sources, overlap, verdicts",
    "report": "tables, plots and the verdict in one HTML page",
    "run": "the whole chain in one process",
}
PLANNED = ("check", "run")
"""What concerns a whole run: its mistakes are said together."""
TOOLS = {
    "inspect": "selectmoe inspect ROUTER_DATA: what is in router data, as numbers and plots",
    "demo": "real rows and a small real model from installed packages, to try Select-MoE with",
    "clean": "remove what abandoned runs left below a work root",
    "sync": "selectmoe sync WORK_ROOT: send to MLflow what could not be sent before",
}
SPECIAL = re.compile(r"[\s()\[\]{},='\"#&;<>!^`]")
"""What Hydra's grammar does not take in a bare string."""
CREDENTIAL_KEY = re.compile(
    r"(^|[._])(password|passwd|pwd|secret|credentials?|token|\w*(api|access|secret)_?key\w*|\w*_secret)$", re.I
)
CREDENTIAL_VALUE = re.compile(
    r"://[^/\s]*@|\b(AKIA|ASIA)[A-Z0-9]{16}\b|\b(hf|ghp|gho)_[A-Za-z0-9]{30,}|[?&]X-Amz-", re.I
)
"""What looks like a credential: a key's last word; a URI with a user, a signed URL, keys with a known form."""


def usage() -> str:
    """The text of `selectmoe --help`."""
    lines = ["usage: selectmoe STAGE key=value ...   (selectmoe STAGE --help: every key with its meaning)", ""]
    for title, entries in (("stages", STAGES), ("tools", TOOLS)):
        lines += [f"{title}:"] + [f"  {name:<9} {doc}" for name, doc in entries.items()] + [""]
    lines += [
        "  --cfg job     print the resolved configuration and do nothing",
        "  --version     print the version",
        "",
        "exit codes: 0 done, 1 our fault or the world's, 2 your input, 3 it ran and the answer is no",
    ]
    return "\n".join(lines)


def stage_help(name: str, cls: Any) -> str:
    """The text of `selectmoe STAGE --help`: every key with its default and meaning."""
    from selectmoe.config import MISSING, leaves

    lines = [f"usage: selectmoe {name} key=value ...", "", f"{({**STAGES, **TOOLS})[name]}", ""]
    for leaf in leaves(cls):
        default = "required" if leaf.default == MISSING else f"default {_shown(leaf.default)}"
        lines.append(f"  {leaf.name}\n      {leaf.doc} [{default}; {leaf.role}]")
    if name in ("run", "check"):
        lines.insert(4, f"  preset\n      values that belong together: {', '.join(_presets())} [default none]")
    return "\n".join(lines)


def _presets() -> list[str]:
    return sorted(path.stem for path in (Path(__file__).parent / "conf" / "preset").glob("*.yaml"))


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return "[" + ",".join(map(str, value)) + "]"
    return repr(value) if value == "" else str(value)


def config_class(name: str) -> Any:
    """The configuration class of a stage or tool, by its name."""
    module = "run" if name == "check" else name
    return getattr(importlib.import_module(f"selectmoe.{module}"), f"{module.capitalize()}Config")


def compose(name: str, overrides: Sequence[str]) -> Any:
    """Compose the configuration of a stage from `key=value` overrides with Hydra.

    Returns:
        The configuration object, complete and checked (`config.require`, `validate`).

    Raises:
        UserError: an unknown key, a value that does not parse or has the wrong type, or a required key missing.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize, initialize_config_module
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from selectmoe.config import build, explain, require

    cls = config_class(name)
    groups = {"preset"} if name in ("run", "check") else set()
    _check_keys(overrides, cls, groups)
    store = ConfigStore.instance()
    store.store(name=f"{name}_schema", node=cls)
    defaults: list[Any] = [f"{name}_schema", *({g: "none"} for g in sorted(groups)), "_self_"]
    store.store(name=f"{name}_root", node={"defaults": defaults})
    GlobalHydra.instance().clear()
    searched = (
        initialize_config_module("selectmoe.conf", version_base="1.3")
        if groups
        else initialize(config_path=None, version_base="1.3")
    )
    try:
        with searched:
            composed = hydra_compose(f"{name}_root", overrides=_quoted(overrides, cls))
        mapping = OmegaConf.to_container(composed, throw_on_missing=False)
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        raise UserError(explain(cause, cls)) from None
    assert isinstance(mapping, dict)
    config = build(cls, {str(key): value for key, value in mapping.items()})
    require(config)
    config.validate()
    return config


def refuse_credentials(overrides: Sequence[str]) -> None:
    """Stop before a credential that somebody typed reaches a log, a manifest, `.hydra/` or MLflow.

    Raises:
        UserError: a word looks like one; the message names the key and never the value.
    """
    for override in overrides:
        key, sign, value = override.partition("=")
        if CREDENTIAL_KEY.search(key) or CREDENTIAL_VALUE.search(value if sign else override):
            named = f"{key}=" if sign else "a word of the command"
            raise UserError(
                f"{named} looks like a credential: those come from the environment only "
                "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_PASSWORD, HF_TOKEN)"
            )


def _check_keys(overrides: Sequence[str], cls: Any, groups: set[str]) -> None:
    """Say at once what is wrong with the words of a command."""
    import difflib

    from selectmoe.config import leaves

    refuse_credentials(overrides)
    known = [leaf.name for leaf in leaves(cls)] + sorted(groups)
    free = _free(cls)
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign:
            raise UserError(f"{override!r} is not of the form key=value (selectmoe --help)")
        if key in groups:
            _known_preset(value)
        inside = any(key.startswith(name + ".") for name in free)
        if not inside and key not in known and not any(name.startswith(key + ".") for name in known):
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or known[:5]
            raise UserError(f"unknown key {key!r}; nearest known: {', '.join(near)} (--help lists all)")


def _free(cls: Any) -> list[str]:
    """The keys that hold a mapping of names that the configuration class does not know."""
    from selectmoe.config import leaves

    return [leaf.name for leaf in leaves(cls) if get_origin(leaf.type) is dict]


def _known_preset(name: str) -> None:
    if name not in _presets():
        raise UserError(f"preset={name} is unknown; known: {', '.join(_presets())}")


def _quoted(overrides: Sequence[str], cls: Any) -> list[str]:
    """Quote a string for Hydra's grammar where it would not take it bare, so that any path can be typed as it is.

    What lies in a free mapping is new to Hydra: `++` says that it may be.
    """
    from selectmoe.config import leaves

    free = _free(cls)

    strings = {leaf.name for leaf in leaves(cls) if leaf.type is str}
    out = []
    for override in overrides:
        key, _, value = override.partition("=")
        if key in strings and SPECIAL.search(value) and value[0] not in "'\"" and "${" not in value:
            escaped = value.replace("\\", "\\\\").replace("'", "\\'")
            override = f"{key}='{escaped}'"
        out.append(f"++{override}" if any(f"{key}.".startswith(f"{name}.") for name in free) else override)
    return out


def _save_overrides(output: Path, config: Any, overrides: Sequence[str]) -> None:
    """The resolved configuration and what was typed, beside the output (outside its manifest)."""
    import yaml

    from selectmoe.config import values

    folder = output / ".hydra"
    folder.mkdir(parents=True, exist_ok=True)
    resolved = values(config, "identity", "execution", "input")
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False), encoding="utf-8")
    (folder / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)), encoding="utf-8")


def dispatch(arguments: list[str]) -> int:
    """Do what the command line says; returns the exit code or raises."""
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(usage())
        return 0
    if arguments[0] == "--version":
        from selectmoe import __version__

        print(__version__)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in STAGES and name not in TOOLS:
        raise UserError(f"unknown stage {name!r}; there are: {', '.join([*STAGES, *TOOLS])}")
    if name == "sync":
        return _sync(rest)
    if "--help" in rest or "-h" in rest:
        print(stage_help(name, config_class(name)))
        return 0
    show = "--cfg" in rest
    if show:
        at = rest.index("--cfg")
        if rest[at + 1 : at + 2] != ["job"]:
            raise UserError("--cfg takes one word: job")
        del rest[at : at + 2]
    if name == "inspect":
        rest = importlib.import_module("selectmoe.inspect").words(rest)
    config = compose(name, rest)
    if show:
        import yaml

        from selectmoe.config import values

        print(yaml.safe_dump(values(config, "identity", "execution", "input"), sort_keys=False), end="")
        return 0
    if config.work_root.startswith("s3://") and name not in PLANNED:
        from selectmoe.storage import prove_store

        prove_store(config.work_root)
    if name == "clean":  # no stage: it writes no output
        importlib.import_module("selectmoe.clean").run(config)
        return 0
    module = importlib.import_module(f"selectmoe.{name}")
    if getattr(config, "dry_run", False):
        module.run(config)
        return 0
    from selectmoe import sending

    place, remote = Path(config.output_dir), config.output_dir.startswith("s3://")
    log = None if distributed.rank() or remote else place / "logs" / f"{name}.log"
    refusal: Refused | None = None
    try:
        with at_stage(name, log=log):
            # the whole run's mistakes are said before anything is written, or told to MLflow
            prepared = [module.plan(config)] if name in PLANNED else []
            with sending.command(name, config):
                output = module.run(config, *prepared)
    except Refused as error:  # it ran, and what it wrote is complete
        output, refusal = place, error
    if distributed.rank():  # of several processes that train together, the first writes
        return 0
    if not remote:
        _save_overrides(place, config, rest)
    print(output)
    if refusal:
        raise refusal
    return 0


def _sync(rest: list[str]) -> int:
    if len(rest) != 1 or rest[0].startswith("-"):
        print("usage: selectmoe sync WORK_ROOT")
        return 0 if rest in (["--help"], ["-h"]) else 2
    from selectmoe import sending

    print(f"{sending.sync(rest[0])} outputs sent")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script."""
    quiet()
    name = f"selectmoe (process {distributed.rank()})" if distributed.world() > 1 else "selectmoe"
    return enter(name, lambda: dispatch(list(sys.argv[1:] if arguments is None else arguments)))


if __name__ == "__main__":
    sys.exit(main())
