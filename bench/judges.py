"""Pools of realistic lengths and untrained judges that benchmarks read them with. No command runs this module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.workloads import lengths
from selectmoe import ingest, pretrain
from selectmoe.config import load

WORDS = [
    "the",
    "river",
    "runs",
    "past",
    "stone",
    "walls",
    "and",
    "a",
    "copper",
    "lantern",
    "in",
    "winter",
    "while",
    "engines",
]
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
}


def word_pool(folder: Path, rows: int, datasets: int = 1, most: int = 1024) -> Path:
    """Ingest's output over rows of the workload `lengths`, a word about a token.

    Args:
        folder: where; the rows' own files lie beside it.
        rows: how many.
        datasets: over which they are spread.
        most: words of a row at most.
    """
    source = folder.with_name(f"{folder.name}-rows")
    source.mkdir(parents=True, exist_ok=True)
    lines: list[list[str]] = [[] for _ in range(datasets)]
    for n, tokens in enumerate(lengths(rows)):
        words = [WORDS[(n * 7 + k * (n % 5 + 1)) % len(WORDS)] for k in range(min(tokens, most))]
        cut = max(1, len(words) // 4)
        turns = {"user": " ".join(words[:cut]), "assistant": " ".join([*words[cut:], f"number {n}"])}
        messages = [{"role": role, "content": text} for role, text in turns.items()]
        lines[n % datasets].append(json.dumps({"messages": messages}) + "\n")
    for number, part in enumerate(lines):
        (source / f"d{number}.jsonl").write_text("".join(part), encoding="utf-8")
    return ingest.run(load(ingest.IngestConfig, {"holdout": 0}, data=str(source), output_dir=str(folder)))


def tokenizer_of(folder: Path, pool: Path) -> Path:
    """A checkpoint that has a tokenizer for such rows."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "steps": 1, "vocab_size": 400}
    return pretrain.run(load(pretrain.PretrainConfig, sizes, data=str(pool), output_dir=str(folder)))


def judge_of(folder: Path, tokenizer: Path, sizes: dict[str, Any], **config: Any) -> Path:
    """A Select-MoE checkpoint of these sizes with fresh weights."""
    import torch
    from transformers import AutoTokenizer

    from selectmoe.modeling import SelectMoeConfig, SelectMoeForCausalLM

    words = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    own = {"vocab_size": len(words), "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    SelectMoeForCausalLM(SelectMoeConfig(**{**own, **sizes}, **config)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
