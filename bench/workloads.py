"""The workloads that benchmarks name: models of two sizes, and rows of realistic lengths. No command runs this module."""

from __future__ import annotations

import random
from typing import Any

REF_18M: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 4096,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
REF_117M: dict[str, Any] = {**REF_18M, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 8}
"""Configurations of an OLMoE of 18 and of 117 million parameters."""


def lengths(n: int, seed: int = 0) -> list[int]:
    """Tokens of `n` rows: log-normal (mu 4.6, sigma 0.8), clipped to 8..1024."""
    rng = random.Random(seed)
    return [min(1024, max(8, round(rng.lognormvariate(4.6, 0.8)))) for _ in range(n)]
