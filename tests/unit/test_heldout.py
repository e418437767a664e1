"""Held-out answer bits: .venv/bin/python -m pytest tests/unit/test_heldout.py"""

import math
from types import SimpleNamespace

import pytest
import torch
from test_finetune import rows, save_target

from selectmoe import finetuning, heldout
from selectmoe.pool import Row
from selectmoe.storage import LocalStore
from selectmoe.template import encode, load_tokenizer


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def model(target):
    return finetuning.load_model(target, 0, torch.float32, torch.device("cpu"))


def measure(model, encoded, tokenizer, work, batch_size=3):
    out = SimpleNamespace(work=LocalStore(work))
    return heldout.answer_bits(model, encoded, tokenizer.eos_token_id, tokenizer.pad_token_id, batch_size, out)


def test_bits_are_those_of_the_answers_text(model, target, tmp_path):
    tokenizer = load_tokenizer(target)
    turns = [
        {"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, ["hi", "yes", "so", "né"], strict=True)
    ]
    pool = [*rows(6), Row("toy", "two-turns", turns)]
    kept, encoded, dropped = heldout.measurable(pool, tokenizer, 256)
    assert (kept, dropped) == (pool, {})
    bits = measure(model, encoded, tokenizer, tmp_path)
    for row, e, value in zip(pool, encoded, bits, strict=True):
        logp = model(torch.tensor([e.input_ids])).logits[0].log_softmax(-1).detach()
        places = [i for i, on in enumerate(e.answer) if on and e.input_ids[i] != tokenizer.eos_token_id]
        assert len(places) == heldout.answer_bytes(row)  # this tokenizer's tokens are bytes
        expected = -sum(float(logp[i - 1, e.input_ids[i]]) for i in places) / math.log(2)
        assert value == pytest.approx(expected, rel=1e-5)
    assert heldout.answer_bytes(pool[-1]) == len("yes") + len("né".encode())


def test_batch_size_does_not_matter_beyond_rounding(model, target, tmp_path):
    tokenizer = load_tokenizer(target)
    encoded = [encode(row.messages, tokenizer, 256) for row in rows(9)]
    one, four = (measure(model, encoded, tokenizer, tmp_path / str(b), b) for b in (1, 4))
    assert one == pytest.approx(four, rel=1e-5)


def test_interrupted_and_taken_up_again(model, target, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(target)
    encoded = [encode(row.messages, tokenizer, 256) for row in rows(9)]
    whole = measure(model, encoded, tokenizer, tmp_path / "whole")
    monkeypatch.setattr(heldout, "SAVE_SECONDS", -1.0)
    calls = []

    def answer_nll(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return finetuning.answer_nll(*args)

    monkeypatch.setattr(heldout, "answer_nll", answer_nll)
    with pytest.raises(KeyboardInterrupt):
        measure(model, encoded, tokenizer, tmp_path / "cut")
    assert measure(model, encoded, tokenizer, tmp_path / "cut") == whole
    assert len(calls) == 4


def test_rows_that_cannot_be_measured_have_a_reason(target):
    tokenizer = load_tokenizer(target)
    long = Row("toy", "long", [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x" * 300}])
    mute = Row("toy", "mute", [{"role": "user", "content": "q"}])
    kept, encoded, dropped = heldout.measurable([*rows(2), long, mute], tokenizer, 128)
    assert len(kept) == len(encoded) == 2
    assert dropped == {heldout.CUT: 1, heldout.EMPTY: 1}
