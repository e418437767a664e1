"""The commands of docs/image.md that are marked `bash image`, run with the image that is tested."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from engine import CLIENT

from selectmoe import manifest

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "image.md"
BLOCK = re.compile(r"^```bash image\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_commands_of_the_page_about_the_image(image: str, rows: Path, tmp_path: Path) -> None:
    shutil.copytree(rows, tmp_path / "rows")
    (tmp_path / "out").mkdir()
    (tmp_path / "out").chmod(0o777)
    environment = os.environ | {"PATH": f"{Path(CLIENT).parent}:{os.environ['PATH']}"}
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    for text in blocks:
        command = ["bash", "-euxo", "pipefail", "-c", text.replace("select-moe:dev", image)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(blocks) == 2
    assert manifest.read_manifest(tmp_path / "out" / "pool").stage == "ingest"
