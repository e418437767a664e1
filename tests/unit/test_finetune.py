"""Stage finetune: .venv/bin/python -m pytest tests/unit/test_finetune.py"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selectmoe import finetune, finetuning
from selectmoe.config import load
from selectmoe.errors import UserError
from selectmoe.manifest import read_manifest
from selectmoe.pool import Row
from selectmoe.selection import FILE, Selected, write_selected
from selectmoe.template import encode, encode_many, load_tokenizer

WORDS = ["red", "green", "blue", "stone", "river", "cloud", "bread", "apple", "quiet", "storm"]


def save_target(folder: Path, layers: int = 2) -> Path:
    """A Llama of a few thousand parameters whose tokens are bytes."""
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"<eos>": len(vocab)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def rows(n: int, factor: int = 1) -> list[Row]:
    out = []
    for i in range(n):
        answer = " ".join(WORDS[(i * k + k) % 10] for k in range(1, 2 + factor * (1 + i % 4)))
        messages = [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": answer}]
        out.append(Row("toy", f"toy-{i:02}", messages))
    return out


def save_rows(folder: Path, chosen: list[Row]) -> Path:
    folder.mkdir(parents=True)
    write_selected(folder / FILE, [Selected(row, {}, None, None) for row in chosen])
    return folder


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def selection(tmp_path_factory):
    return save_rows(tmp_path_factory.mktemp("select") / "s", rows(10))


def config(target, selection, output, **more):
    training = {"batch_size": 4, "per_device_batch_size": 2, "epochs": 2, "lora_r": 4, "lora_alpha": 8}
    training |= {"learning_rate": 1e-2, "max_length": 256} | more.pop("training", {})
    given = {"training": training, "seed": 1, "threads": 1} | more
    paths = {"training.model": str(target), "dataset.data_path": str(selection), "output_dir": str(output)}
    return load(finetune.FinetuneConfig, given, **paths)


def test_output_is_an_adapter_that_has_learned(target, selection, tmp_path):
    out = finetune.run(config(target, selection, tmp_path / "a", training={"epochs": 8, "learning_rate": 0.03}))
    names = {f["path"] for f in read_manifest(out).files}
    assert names == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "training.json",
        "metrics.jsonl",
        *(f"checkpoint-24/{n}" for n in ("adapter_model.safetensors", "adapter_config.json", "trainer_state.json")),
    }
    history = json.loads((out / "checkpoint-24/trainer_state.json").read_text())["log_history"]
    assert history[-1]["loss"] < history[0]["loss"] - 0.1
    assert history[0]["loss"] == pytest.approx(math.log(257), rel=0.05)
    assert finetune.run(config(target, selection, tmp_path / "a", training={"epochs": 8, "learning_rate": 0.03})) == out


def test_same_bytes_twice_and_another_seed_differs(target, selection, tmp_path):
    one, two = (finetune.run(config(target, selection, tmp_path / n)) for n in "ab")
    other = finetune.run(config(target, selection, tmp_path / "c", seed=2))
    assert read_manifest(one).identity == read_manifest(two).identity
    assert (one / finetuning.WEIGHTS).read_bytes() == (two / finetuning.WEIGHTS).read_bytes()
    assert (one / finetuning.WEIGHTS).read_bytes() != (other / finetuning.WEIGHTS).read_bytes()


def test_killed_and_resumed_gives_the_same_bytes(target, selection, tmp_path, monkeypatch):
    whole = finetune.run(config(target, selection, tmp_path / "whole"))
    steps = []
    real = finetuning.Trainer.step

    def step(self, *args):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt  # like a kill: nothing after it is executed, nothing is cleaned up
        return real(self, *args)

    monkeypatch.setattr(finetuning.Trainer, "step", step)
    with pytest.raises(KeyboardInterrupt):
        finetune.run(config(target, selection, tmp_path / "cut"))
    cut = finetune.run(config(target, selection, tmp_path / "cut"))
    assert len(steps) == 5 + 3  # the second epoch (three steps) again, the first not
    assert read_manifest(cut).identity == read_manifest(whole).identity
    assert not (cut / ".work").exists()


def test_loss_is_the_mean_over_the_learned_tokens_of_the_step(target):
    tokenizer = load_tokenizer(target)
    encoded = [encode(row.messages, tokenizer, 256) for row in rows(5)]
    model = finetuning.load_model(target, 0, torch.float32, torch.device("cpu"))
    total = n = 0.0
    for e in encoded:
        logits = model(torch.tensor([e.input_ids])).logits[0, :-1].log_softmax(-1)
        for position, (token, on) in enumerate(zip(e.input_ids[1:], e.answer[1:], strict=True)):
            if on:
                total, n = total - float(logits[position, token].detach()), n + 1
    with torch.no_grad():
        parts = []
        for batch in finetuning.by_length(encoded, range(5), 2):
            chosen = [encoded[i] for i in batch]
            parts.append(
                finetuning.answer_nll(model, finetuning.pad(chosen, [e.answer for e in chosen], 0, torch.device("cpu")))
            )
    assert sum(len(p) for p in parts) == n
    assert float(torch.cat(parts).mean()) == pytest.approx(total / n, rel=1e-5)


def test_micro_batches_do_not_change_the_step(target, selection, tmp_path):
    plain = {"lora_dropout": 0.0, "epochs": 1}
    a = finetune.run(config(target, selection, tmp_path / "a", training=plain | {"per_device_batch_size": 1}))
    b = finetune.run(config(target, selection, tmp_path / "b", training=plain | {"per_device_batch_size": 4}))
    left, right = (load_file(x / finetuning.WEIGHTS) for x in (a, b))
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("match", finetune.MATCHES)
def test_arms_are_comparable(match):
    reference = [10, 20, 30, 40, 50, 60, 70]
    tokens = [5, 9, 13, 8, 30, 22, 11, 4, 17, 90]
    given = {"batch_size": 3, "epochs": 4, "match": match, "seed": 3}
    steps = finetune.plan(tokens, reference, **given)
    assert len(steps) == len(finetune.plan(reference, reference, **given)) == 12
    assert all(steps)
    seen = [i for step in steps for i in step]
    if match == "tokens":
        done, total = 0, sum(reference) * 4
        for i, step in enumerate(steps, 1):
            done += sum(tokens[j] for j in step)
            assert abs(done - total * i / 12) <= max(tokens) / 2
    elif match == "rows":
        assert len(seen) == len(reference) * 4
    else:
        assert len(seen) == 12 * 3
    for start in range(0, len(seen) - 10, 10):
        assert sorted(seen[start : start + 10]) == list(range(10))  # whole passes
    assert steps != finetune.plan(tokens, reference, **(given | {"seed": 4}))


def test_reference_makes_tokens_equal(target, selection, tmp_path):
    long = save_rows(tmp_path / "long", rows(10, factor=2))
    out = finetune.run(config(target, long, tmp_path / "out", arm="random", reference=str(selection)))
    summary = json.loads((out / "training.json").read_text())
    assert abs(summary["learned_tokens"] - summary["reference_learned_tokens"]) <= 70
    assert summary["steps"] == 6
    assert set(read_manifest(out).inputs) == {"model", "rows", "reference"}


def test_rows_whose_answer_is_cut_away_are_dropped_with_a_reason(target, tmp_path):
    lost = Row("toy", "lost", [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "yes"}])
    mute = Row("toy", "mute", [{"role": "user", "content": "hello"}])
    path = save_rows(tmp_path / "s", [*rows(4), lost, mute])
    found = read_manifest(finetune.run(config(target, path, tmp_path / "out")))
    assert found.rows == {"in": 6, "out": 4, "dropped": {finetune.CUT_AWAY: 1, finetune.NO_ANSWER: 1}}
    nothing = save_rows(tmp_path / "n", [lost])
    with pytest.raises(UserError, match="max_length"):
        finetune.run(config(target, nothing, tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_spec7_20_what_is_fine_tuned_on_is_what_was_scored(target, selection, tmp_path):
    """What the target's embedding is given are the rows' tokens by the template that warm-up and routing use, and padding."""
    tokenizer, seen = load_tokenizer(target), set()

    def look(module, args):
        if isinstance(module, torch.nn.Embedding):
            seen.update(map(tuple, args[0].tolist()))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        finetune.run(config(target, selection, tmp_path / "a", training={"epochs": 1, "max_length": 48}))
    finally:
        hook.remove()
    wanted = [tuple(e.input_ids) for e in encode_many(rows(10), tokenizer, 48) if any(e.answer[1:])]
    pad = tokenizer.pad_token_id
    given = {
        ids if ids in wanted else tuple(ids[: max(n for n in range(len(ids)) if ids[:n] in wanted)]) for ids in seen
    }
    assert given == set(wanted)
    assert all(set(ids[len(row) :]) <= {pad} for ids in seen for row in wanted if ids[: len(row)] == row)


def test_spec7_8_an_impossible_batch_is_an_error(target, selection, tmp_path):
    with pytest.raises(UserError, match="per_device_batch_size=8 is more than"):
        config(target, selection, tmp_path, training={"per_device_batch_size": 8})
    with pytest.raises(UserError, match=r"raise training\.batch_size"):
        finetune.plan([100, 100], [1, 1, 1, 1], batch_size=1, epochs=1, match="tokens", seed=0)


def test_spec7_11_every_step_has_learned_tokens():
    steps = finetune.plan([1, 1, 500], [400] * 8, batch_size=2, epochs=3, match="tokens", seed=0)
    assert len(steps) == 12
    assert all(steps)


def test_spec7_43_44_any_causal_model_on_a_cpu_and_a_wrong_target_is_named(target, selection, tmp_path):
    with pytest.raises(UserError, match=r"no wq; it has .*q_proj"):
        finetune.run(config(target, selection, tmp_path / "a", training={"target_modules": ["wq"]}))
    with pytest.raises(UserError, match=r"layers=3, but .* has 2"):
        finetune.run(config(target, selection, tmp_path / "b", training={"layers": 3}))
    with pytest.raises(UserError, match=r"training\.model=nowhere"):
        finetune.run(config("nowhere", selection, tmp_path / "c"))
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        finetune.run(config(selection, selection, tmp_path / "d"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [
        {"match": "words"},
        {"arm": ""},
        {"seed": -1},
        {"training": {"epochs": 0}},
        {"training": {"max_length": 1}},
        {"training": {"learning_rate": 0.0}},
        {"training": {"lora_dropout": 1.0}},
        {"training": {"target_modules": []}},
    ],
)
def test_values_out_of_range(target, selection, tmp_path, wrong):
    with pytest.raises(UserError):
        config(target, selection, tmp_path, **wrong)
