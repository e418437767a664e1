"""The predecessor's commands as they are typed: `pytest tests/warmup/test_stage_1_script.py`"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent


def test_stage_1_as_in_the_seed(small_judge: Any, small_pool: Path, tmp_path: Path) -> None:
    """Rows from dataset.*, results where the seed says, in the seed's form."""
    data = small_pool.parent / "data"
    words = [f"selector_model.path={small_judge('applied')}", f"dataset.local.data_dir={data}"]
    words += ["dataset.local.dataset_names=[a]", "training.learning_rate=1e-4", "training.subset_ratio=0.5", "tag=x"]
    command = [
        "bash",
        str(ROOT / "scripts" / "run_stage_1.sh"),
        *words,
        "training.batch_size=4",
        "training.epochs=1",
        "threads=1",
    ]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    out = tmp_path / done.stdout.splitlines()[-1]
    where = r"outputs/stage_1_warmup/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d-dataset_names-a_lr-1e-4_subset_ratio-0\.5_tag-x_bs-4_epochs-1_threads-1"
    assert re.fullmatch(where, str(out.relative_to(tmp_path)))
    saved = torch.load(out / "full_rank_weights.pt", weights_only=True)
    assert saved["mode"] == "parameter"
    assert saved["tokenizer_saved"] is True
    assert any(name.endswith("normal_moe.gate.weight") for name in saved["full_rank_weights"])
    assert (out / ".hydra" / "overrides.yaml").is_file()
    assert "selectmoe.cli warmup" in (out / "logs" / "stage_1.log").read_text()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["config"]["identity"]["recipe"] == "legacy"
    assert manifest["rows"]["in"] == 20
    assert "recipe=observer" in done.stderr
    assert "selectmoe: " not in done.stderr
