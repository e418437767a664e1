"""Pooling over tokens, against NumPy: `pytest tests/unit/test_judge.py`."""

from __future__ import annotations

import numpy as np
import torch

from selectmoe.judge import (
    HEAD_POSITIONS,
    Arrays,
    answer_nll,
    answers_only,
    out_of_memory,
    pool_probs,
    pool_scores,
    weighted_mean,
)
from selectmoe.template import Kind

B, T, L, E = 3, 7, 2, 5


def outputs(seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randn(B, T, 1, generator=generator) for _ in range(L)]
    logits = [torch.randn(B * T, E, generator=generator) for _ in range(L)]
    mask = torch.arange(T) < torch.tensor([[7], [4], [1]])
    answer = mask & (torch.arange(T) >= torch.tensor([[3], [2], [5]]))
    return scores, logits, mask, answer


def pool_outputs(
    scores: list[torch.Tensor], logits: list[torch.Tensor], mask: torch.Tensor, answer: torch.Tensor
) -> Arrays:
    names = ("quality_score", "good_ratio", "quality_score_answer", "good_ratio_answer")
    gates = [pool_scores(layer, mask, answer) for layer in scores]
    pooled = {name: torch.stack(layers, 1).numpy() for name, layers in zip(names, zip(*gates))}
    return pooled | {"router_probs": torch.stack([pool_probs(layer, mask) for layer in logits], 1).numpy()}


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


def test_answers_alone_keep_their_tags_and_end_with_the_last_answer_token() -> None:
    tag, question, theirs, answer = Kind.TAG, Kind.USER, Kind.ANSWER_TAG, Kind.ASSISTANT
    kinds = np.array(
        [Kind.BOS, tag, question, tag, theirs, answer, answer, theirs, tag, question, tag, theirs], np.uint8
    )
    ids = np.arange(len(kinds), dtype=np.int32)
    assert answers_only(ids, kinds)[0].tolist() == [0, 4, 5, 6]  # the second answer was cut off
    longer = np.append(kinds, [answer, theirs]).astype(np.uint8)
    found = answers_only(np.arange(len(longer), dtype=np.int32), longer)
    assert found[0].tolist() == [0, 4, 5, 6, 7, 11, 12]
    assert (found[1] == longer[found[0]]).all()
    assert len(answers_only(ids[:5], kinds[:5])[0]) == 0


def test_a_later_token_weighs_more_in_an_embedding() -> None:
    hidden = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    hidden[1, 2:] = 1e6  # padding
    found = weighted_mean(hidden, mask).numpy()
    assert np.allclose(found[0], np.average(hidden[0].numpy(), axis=0, weights=[1, 2, 3, 4]), atol=1e-6)
    assert np.allclose(found[1], np.average(hidden[1, :2].numpy(), axis=0, weights=[1, 2]), atol=1e-6)


def test_out_of_memory_is_told_from_other_errors() -> None:
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory")
    )
    assert not out_of_memory(RuntimeError("shape mismatch"))
