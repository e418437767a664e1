"""The commands that users of the predecessor type, in ours: what `scripts/` calls.

    CUDA_VISIBLE_DEVICES=0,1,2,3 bash scripts/run_stage_1.sh training.learning_rate=1e-4 tag=x
    bash scripts/run_stage_2.sh model_checkpoint_path=.../full_rank_weights.pt       # selectmoe.seed_stage_2

Keys are passed on as they are; what is added is where results lie (`output_folder`), the predecessor's defaults, one
process per GPU, and `logs/` beside the result. Input is checked here, before torchrun is started and any GPU is taken:
torchrun turns every exit code into 1.
"""

from __future__ import annotations

import datetime
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from selectmoe.config import leaves
from selectmoe.entry import enter
from selectmoe.errors import UserError

if TYPE_CHECKING:
    from selectmoe.sources import DatasetConfig

SHORT = {
    "learning_rate": "lr",
    "batch_size": "bs",
    "per_device_batch_size": "pbs",
    "quality_loss_type": "loss",
    "quality_loss_weight": "weight",
}
"""Names in a folder's name; a key that is not here is called by its last word."""
MAX_NAME = 120
"""Characters of a folder's name at most."""
JUDGE = "converted_models/select_moe_converted_OLMoE-1B-7B-0125"
"""Where the predecessor's conversion put its checkpoint."""
STAGE_1 = {"recipe": "legacy", "selector_model.path": JUDGE}
"""What the predecessor's stage 1 had by default."""
DATASETS = {"dataset.local.dataset_names": "[cot,dolly,flan_v2,oasst1]"}
"""The predecessor's datasets, where neither data= nor another folder is given."""


def folder_name(overrides: Sequence[str]) -> str:
    """The part of a folder's name that tells runs apart, such as ``lr-1e-4_tag-x``: nothing that a shell or Hydra reads."""
    parts = []
    for override in overrides:
        key, _, value = override.partition("=")
        last = key.rsplit(".", 1)[-1]
        if last in ("output_dir", "work_root", "path", "data", "holdout", "data_dir"):
            continue
        parts.append(re.sub(r"[^A-Za-z0-9._]+", "-", f"{SHORT.get(last, last)}-{value}").strip("-"))
    return "_".join(parts)[:MAX_NAME].rstrip("-_.")


def output_folder(stage: str, overrides: Sequence[str], root: str = "outputs") -> Path:
    """A new folder ``outputs/STAGE/DATE/TIME[-OVERRIDES]``; a second one of the same second gets ``-2``."""
    now = datetime.datetime.now()
    name = "-".join(part for part in (now.strftime("%H-%M-%S"), folder_name(overrides)) if part)
    base = Path(root, stage, now.strftime("%Y-%m-%d"))
    for n in range(1, 1000):
        place = base / (name if n == 1 else f"{name}-{n}")
        try:
            place.mkdir(parents=True)
        except FileExistsError:
            continue
        return place
    raise UserError(f"{base / name} and 999 others exist already")


def devices() -> int:
    """The GPUs that this process sees (`CUDA_VISIBLE_DEVICES`)."""
    import torch

    return torch.cuda.device_count()


def given(overrides: Sequence[str]) -> dict[str, str]:
    """The overrides by key.

    Raises:
        UserError: one is not of the form key=value.
    """
    if wrong := [word for word in overrides if "=" not in word]:
        raise UserError(f"{wrong[0]!r} is not of the form key=value (--help lists the keys)")
    return dict(word.split("=", 1) for word in overrides)


def stage_1_words(overrides: Sequence[str]) -> list[str]:
    """The words of `selectmoe warmup` that an old command means; without output_dir and processes."""
    keys = given(overrides)
    keys.pop("tag", None)
    if "dataset.subset_ratio" in keys:
        keys["training.subset_ratio"] = keys.pop("dataset.subset_ratio")
    recipe = keys.get("recipe", STAGE_1["recipe"])
    other = {"legacy": "observer (ours)", "observer": "legacy (the predecessor's)"}.get(recipe, "observer or legacy")
    print(f"run_stage_1: recipe={recipe}; the other one is recipe={other}", file=sys.stderr)
    defaults = dict(STAGE_1)
    if "data" not in keys and "dataset.local.data_dir" not in keys:
        defaults |= DATASETS
    return [f"{key}={value}" for key, value in (defaults | keys).items()]


def stage_1(overrides: Sequence[str]) -> int:
    """Stage 1: `selectmoe warmup`, one process per GPU, one on a CPU.

    Returns:
        The exit code: that of `selectmoe warmup`, where it is not torchrun's.

    Raises:
        UserError: what the stage itself would refuse.
    """
    from selectmoe import warmup
    from selectmoe.cli import compose, refuse_credentials

    refuse_credentials(overrides)
    words = stage_1_words(overrides)
    keys = given(words)
    processes = devices()
    if processes > 1 and "training.distributed" not in keys:
        words.append("training.distributed=fsdp")
    out = Path(keys["output_dir"]) if "output_dir" in keys else None
    config = compose("warmup", [*words, *([] if out else ["output_dir=outputs"])])
    single = config.training.distributed == "single"
    if not config.data:  # rows must be there before several processes read them
        words = [word for word in words if not word.startswith("dataset.")]
        words += [f"training.subset_ratio={config.share}", f"data={ingest(config.dataset, overrides)}"]
        config = compose("warmup", [*words, *([] if out else ["output_dir=outputs"])])
    warmup.prove(config)
    if out is None:
        out = output_folder("stage_1_warmup", overrides)
        words.append(f"output_dir={out}")
    command = ["selectmoe.cli", "warmup", *words]
    code = logged(
        [sys.executable, "-m", *([] if single else torchrun(max(1, processes))), *command], out, "stage_1.log"
    )
    if code == 0:
        print(out)
    return code


def torchrun(processes: int) -> list[str]:
    """The words between `python -m` and a module that start it as so many processes of this machine."""
    return ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]


def ingest(dataset: DatasetConfig, overrides: Sequence[str]) -> Path:
    """The pool of `dataset.*` as an output of its own, in `outputs/ingest/`."""
    from selectmoe import ingested

    place = output_folder("ingest", [word for word in overrides if word.startswith("dataset.")])
    try:
        return ingested.make(dataset, place)
    except UserError:
        place.rmdir()
        raise


def logged(command: Sequence[str], out: Path, log: str, result: Path | None = None) -> int:
    """Run a command; what it says goes to the screen and into a file in `logs/`.

    Args:
        command: its words.
        out: the folder with `logs/`.
        log: the file's name.
        result: where its result lies, which its last line says and which is not said again; default: `out`.

    Returns:
        Its exit code.
    """
    (out / "logs").mkdir(parents=True, exist_ok=True)
    with (
        open(out / "logs" / log, "a", encoding="utf-8") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        print(" ".join(command), file=file, flush=True)
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            file.flush()
            if line.strip() != str(result or out):
                sys.stderr.write(line)
    return process.returncode


def _stage_2(words: Sequence[str]) -> int:
    from selectmoe.seed_stage_2 import stage_2

    return stage_2(words)


COMMANDS = {"stage_1": stage_1, "stage_2": _stage_2}
SCRIPTS = {"stage_1": "run_stage_1", "stage_2": "run_stage_2"}
SUCCESSORS = {"stage_1": ("warmup",), "stage_2": ("route", "select")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: the command's name, then its words."""
    name, *words = sys.argv[1:] if arguments is None else arguments
    if name not in COMMANDS:
        print(f"known: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if "--help" in words:
        from selectmoe.cli import config_class

        successors = " and ".join(f"selectmoe {stage}" for stage in SUCCESSORS[name])
        print(f"usage: bash scripts/{SCRIPTS[name]}.sh key=value ...   (today: {successors})")
        docs = {leaf.name: leaf.doc for stage in SUCCESSORS[name] for leaf in leaves(config_class(stage))}
        print("\n".join(f"  {key}  {doc}" for key, doc in docs.items()))
        return 0
    return enter(SCRIPTS[name], lambda: COMMANDS[name](words))


if __name__ == "__main__":
    sys.exit(main())
