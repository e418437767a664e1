"""What unit and integration tests share: a pool with its router data, made without a model; a pool and a small judge."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from selectmoe import convert, ingest, pretrain
from selectmoe.config import load
from selectmoe.pool import Row
from selectmoe.router_data import RouterData
from tests.pools import make_pool, make_router_data

WORDS = [
    "river",
    "stone",
    "lantern",
    "copper",
    "window",
    "garden",
    "engine",
    "silver",
    "paper",
    "mountain",
    "harbour",
    "winter",
]


@pytest.fixture
def routed_world(tmp_path: Path) -> dict[str, str]:
    """Sixty rows in a pool and their router data; every third row is planted."""
    n, rng = 60, np.random.default_rng(0)
    keys = sorted((f"d{i % 3}", f"r{i:02d}") for i in range(n))
    ratio = rng.random((n, 2)).astype(np.float32)
    data = RouterData(
        dataset=[key[0] for key in keys],
        id=[key[1] for key in keys],
        tokens=rng.integers(20, 60, size=n),
        answer_tokens=rng.integers(5, 20, size=n),
        truncated=np.zeros(n, bool),
        nll=rng.random(n) + 1,
        nll_unconditional=rng.random(n) + 2,
        answer_bytes=rng.integers(20, 80, size=n),
        quality_score=np.log(ratio / (1 - ratio)),
        good_ratio=ratio,
        quality_score_answer=np.log(ratio / (1 - ratio)),
        good_ratio_answer=ratio,
        router_probs=rng.dirichlet(np.ones(4), size=(n, 2)).astype(np.float32),
    )
    make_pool(tmp_path / "pool", [Row(d, i, [{"role": "assistant", "content": d + i}]) for d, i in keys])
    make_router_data(tmp_path / "router", data)
    lines = [json.dumps({"dataset": d, "id": i, "kind": "swapped"}) + "\n" for d, i in keys[::3]]
    (tmp_path / "planted.jsonl").write_text("".join(lines))
    return {"router_data_dir": str(tmp_path / "router"), "data": str(tmp_path / "pool")}


@pytest.fixture(scope="session")
def small_pool(tmp_path_factory):
    """Ingest's output over 40 rows of two datasets."""
    root = tmp_path_factory.mktemp("pool")
    for name, start in (("a", 0), ("b", 5)):
        lines = []
        for n in range(20):
            words = [WORDS[(start + n + k * (n % 3 + 1)) % len(WORDS)] for k in range(6)]
            question, answer = " ".join(words[:3]), " ".join([*words, f"number {n}"])
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            lines.append(json.dumps({"messages": messages}) + "\n")
        (root / "data").mkdir(exist_ok=True)
        (root / "data" / f"{name}.jsonl").write_text("".join(lines))
    config = load(ingest.IngestConfig, {"holdout": 4}, data=str(root / "data"), output_dir=str(root / "ingest"))
    return ingest.run(config)


@pytest.fixture(scope="session")
def small_olmoe(small_pool, tmp_path_factory):
    """A pretrained OLMoE of two layers."""
    folder = tmp_path_factory.mktemp("olmoe") / "model"
    sizes = {"hidden_size": 32, "intermediate_size": 32, "steps": 5, "vocab_size": 320}
    return pretrain.run(load(pretrain.PretrainConfig, sizes, data=str(small_pool), output_dir=str(folder)))


@pytest.fixture(scope="session")
def small_judge(small_olmoe, tmp_path_factory):
    """A function: gate mode (and other keys of the model) -> a converted checkpoint."""

    def make(mode: str, **keys: str) -> str:
        folder = tmp_path_factory.mktemp(mode) / "model"
        given = {"source_model": str(small_olmoe), "output_dir": str(folder)}
        return str(convert.run(load(convert.ConvertConfig, {"model": {"gate_mode": mode, **keys}}, **given)))

    return make
