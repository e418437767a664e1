"""The commands of README and docs: pytest tests/docs

Blocks marked `bash` or `python` are run. Blocks marked `bash long`, `bash cluster` or `bash image` are checked: every make
target, every `selectmoe` stage and every key in them exists. Those marked `bash image` are run by `make image-test`; what
`bash cluster` has of helm and kubectl is rendered and looked up by `make chart-test` (tests/chart/test_pages.py).
"""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from k8s.kind import COMMANDS
from pipelines.submit import FLAGS, Options
from selectmoe.cli import STAGES, TOOLS, config_class
from selectmoe.config import leaves
from selectmoe.seed_stage_2 import split

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```((?:bash|python)[^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
RUN = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
BLOCKS = [
    pytest.param(kind.strip(), text, id=f"{page.relative_to(ROOT)}-{n}")
    for page in PAGES
    for n, (kind, text) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")), 1)
]


@pytest.mark.parametrize(("kind", "text"), BLOCKS)
def test_block(kind: str, text: str) -> None:
    assert kind in (*RUN, "bash long", "bash cluster", "bash image")
    if kind in RUN:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([*RUN[kind], text], cwd=ROOT, env=environment, check=True, timeout=60)
        return
    for line in filter(None, (line.strip() for line in text.splitlines())):
        if words := shlex.split(line, comments=True):
            check_names(words)


def check_names(words: list[str]) -> None:
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for word in words[1:]:
            name = word.split("=", 1)[0]
            pattern = rf"^{name}:" if "=" not in word else rf"\$\({name}\)"
            assert re.search(pattern, makefile, re.MULTILINE), f"make {word}"
            if name == "ARGS":
                own = word.split("=", 1)[1].split()
                _, _, keys = COMMANDS.get(words[1].removeprefix("kind-"), (None, None, ("file", "check")))
                if words[1].startswith("kind-") and keys is None:
                    check_submitted(own)
                    continue
                if words[1].startswith(("kind-", "images-")):
                    assert {item.split("=", 1)[0] for item in own} <= set(keys or ()), word
                    continue
                check_keys("run", [item for item in own if not item.startswith(("runner=", "image=", "--"))])
    elif words[:2] == ["docker", "run"]:
        if "selectmoe" in words:
            check_names(words[words.index("selectmoe") :])
    elif words[0].endswith("selectmoe"):
        assert words[1] in {**STAGES, **TOOLS}
        check_keys(words[1], [word for word in words[2:] if words[1] != "inspect" or "=" in word])
    elif words[0] == "torchrun":
        at = words.index("selectmoe.cli")
        assert words[at - 1] == "-m"
        assert words[at + 1] in ("warmup", "route", "finetune")
        check_keys(words[at + 1], words[at + 2 :])
    elif words[:4] == ["python", "-m", "pipelines", "submit"]:
        check_submitted(words[4:])
    elif words[:2] == ["bash", "scripts/run_stage_1.sh"]:
        assert (ROOT / words[1]).exists()
        check_keys("warmup", [word for word in words[2:] if not word.startswith("tag=")])
    elif words[:2] == ["bash", "scripts/run_stage_2.sh"]:
        assert (ROOT / words[1]).exists()
        for chosen in (split(words[2:]).route, split(words[2:]).select or {}):
            check_keys("route" if "model_checkpoint_path" in chosen else "select", [f"{key}=" for key in chosen])
    elif words[0] in FOREIGN:
        for word in words[1:]:
            if word.startswith(("helm/", "k8s/")):
                assert (ROOT / word).exists(), word
    else:
        pytest.fail(f"unknown command: {words[0]}")


FOREIGN = ("helm", "kubectl", "docker", "pg_dump", "pg_restore", "rclone")
"""Programs of others, which our pages name."""


def check_submitted(words: list[str]) -> None:
    compiled = next(yaml.safe_load_all((ROOT / "pipelines/select_moe/pipeline.yaml").read_text(encoding="utf-8")))
    known = {field.name for field in dataclasses.fields(Options)} | {*FLAGS}
    known |= {*compiled["root"]["inputDefinitions"]["parameters"]}
    for word in words:
        assert word.split("=", 1)[0] in known, word


def check_keys(stage: str, overrides: list[str]) -> None:
    known = {leaf.name for leaf in leaves(config_class(stage))} | {"preset"}
    for override in overrides:
        assert override.split("=", 1)[0] in known, override


def test_bare_make_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    listed = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    targets = re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)
    assert all(re.search(rf"^  {target}\s", listed, re.MULTILINE) for target in targets)
