"""Pooling over tokens, against NumPy: `pytest tests/unit/test_judge.py`."""

from __future__ import annotations

import numpy as np
import torch

from selectmoe.judge import HEAD_POSITIONS, answer_end, answer_nll, clip, out_of_memory, pool_outputs
from selectmoe.template import Encoded

B, T, L, E = 3, 7, 2, 5


def outputs(seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(B, T, 1, generator=generator) for _ in range(L)]
    logits = [torch.randn(B * T, E, generator=generator) for _ in range(L)]
    mask = torch.arange(T) < torch.tensor([[7], [4], [1]])
    answer = mask & (torch.arange(T) >= torch.tensor([[3], [2], [5]]))
    return scores, logits, mask, answer


def test_means_are_over_valid_and_over_answer_tokens() -> None:
    scores, logits, mask, answer = outputs()
    pooled = pool_outputs(scores, logits, mask, answer)
    for b in range(B):
        m, a = mask[b].numpy(), answer[b].numpy()
        for layer in range(L):
            s = scores[layer][b, :, 0].numpy().astype(float)
            z = np.exp(logits[layer].reshape(B, T, E)[b].numpy().astype(float))
            assert np.isclose(pooled["quality_score"][b, layer], s[m].mean(), atol=1e-6)
            assert np.isclose(pooled["good_ratio"][b, layer], (1 / (1 + np.exp(-s[m]))).mean(), atol=1e-6)
            assert np.allclose(pooled["router_probs"][b, layer], (z / z.sum(-1, keepdims=True))[m].mean(0), atol=1e-6)
            if a.any():
                assert np.isclose(pooled["quality_score_answer"][b, layer], s[a].mean(), atol=1e-6)
                assert np.isclose(pooled["good_ratio_answer"][b, layer], (1 / (1 + np.exp(-s[a]))).mean(), atol=1e-6)
    assert np.isnan(pooled["quality_score_answer"][2]).all()
    assert np.isfinite(pooled["quality_score"]).all()
    assert {array.dtype for array in pooled.values()} == {np.dtype(np.float32)}


def test_spec7_25_what_stands_on_padding_does_not_matter() -> None:
    scores, logits, mask, answer = outputs()
    before = pool_outputs(scores, logits, mask, answer)
    for layer in range(L):
        scores[layer][~mask] = float("nan")
        logits[layer][~mask.reshape(-1)] = float("inf")
    after = pool_outputs(scores, logits, mask, answer)
    assert all(np.array_equal(before[name], after[name], equal_nan=True) for name in before)


def test_spec7_24_the_head_sees_only_positions_that_predict_an_answer_token() -> None:
    torch.manual_seed(0)
    vocabulary, length = 11, HEAD_POSITIONS + 5
    hidden, ids = torch.randn(B, length, 4), torch.randint(vocabulary, (B, length))
    answer = torch.zeros(B, length, dtype=torch.bool)
    answer[0, 1:] = True
    answer[1, [0, 3]] = True  # a first token is predicted by nothing
    linear, seen = torch.nn.Linear(4, vocabulary, bias=False), []

    def head(h: torch.Tensor) -> torch.Tensor:
        seen.append(len(h))
        result: torch.Tensor = linear(h)
        return result

    with torch.no_grad():
        nll = answer_nll(head, hidden, ids, answer)
        logp = torch.log_softmax(linear(hidden).double(), -1)
    assert sum(seen) == length
    assert max(seen) <= HEAD_POSITIONS
    assert np.isclose(nll[0], -np.mean([logp[0, t - 1, ids[0, t]] for t in range(1, length)]), atol=1e-6)
    assert np.isclose(nll[1], -float(logp[1, 2, ids[1, 3]]), atol=1e-6)
    assert np.isnan(nll[2])


def test_the_unconditional_pass_ends_with_the_same_answer_tokens() -> None:
    answer = [False, False, True, True, False, False, True, True]
    assert [answer_end(answer, n) for n in (0, 1, 2, 3, 9)] == [0, 3, 4, 7, 8]
    assert answer_end([], 4) == 0
    part = clip(Encoded(list(range(8)), answer, [False] * 8, [not a for a in answer], False), 4)
    assert part.input_ids == [0, 1, 2, 3]
    assert part.answer == answer[:4]
    assert part.truncated


def test_out_of_memory_is_told_from_other_errors() -> None:
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory")
    )
    assert not out_of_memory(RuntimeError("shape mismatch"))
