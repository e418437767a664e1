"""Small things that several unit tests need: a pool on disk, and a small judge made from it."""

import pytest

from selectmoe import convert, ingest, pretrain
from selectmoe.config import load

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


@pytest.fixture(scope="session")
def small_pool(tmp_path_factory):
    """Ingest's output over 40 rows of two datasets."""
    import json

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
    """A function: gate mode -> a converted checkpoint."""

    def make(mode: str) -> str:
        folder = tmp_path_factory.mktemp(mode) / "model"
        given = {"source_model": str(small_olmoe), "output_dir": str(folder)}
        return str(convert.run(load(convert.ConvertConfig, {"model": {"gate_mode": mode}}, **given)))

    return make
