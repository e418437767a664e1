"""The plan of warm-up's steps, without a model: pytest tests/unit/test_warmup_steps.py"""

import pytest
import torch

from selectmoe import pool, template, token_store, warmup
from selectmoe.config import load
from selectmoe.errors import UserError
from selectmoe.warmup_steps import Plan


@pytest.fixture(scope="module")
def tokenizer(small_olmoe):
    return template.load_tokenizer(small_olmoe)


@pytest.fixture(scope="module")
def rows(small_pool):
    """36 rows of two datasets; some are longer than others."""
    found = pool.read_pool(pool.locate(small_pool))
    for i, row in enumerate(found):
        row.messages[1]["content"] += " and then" * (i % 7)
    return found


def plan(rows, tokenizer, recipe="observer", seed=42, **training):
    fields = {"batch_size": 8, "per_device_batch_size": 4, "max_length": 128, **training}
    given = {"selector_model.path": "m", "data": "d", "output_dir": "o"}
    config = load(warmup.WarmupConfig, {"recipe": recipe, "seed": seed, "training": fields}, **given)
    return Plan(config, rows, tokenizer)


def names(batches):
    return [item.row for batch in batches for item in batch if item.label]


def padding(made):
    """Padded over valid tokens of an epoch."""
    batches = [batch for step in range(made.per_epoch) for batch in made.step(step)]
    padded = sum(len(batch) * max(len(item.encoded) for item in batch) for batch in batches)
    return padded / sum(len(item.encoded) for batch in batches for item in batch)


@pytest.mark.parametrize("more", [{}, {"group_by_length": True}, {"token_budget": 300, "per_device_batch_size": 1}])
def test_an_epoch_holds_every_row_once_and_each_has_its_own_order(rows, tokenizer, more):
    made = plan(rows, tokenizer, epochs=2, **more)
    assert (made.per_epoch, made.steps) == (5, 10)
    first, second = ([names(made.step(e * 5 + i)) for i in range(5)] for e in (0, 1))
    keys = sorted(f"{row.dataset}:{row.id}" for row in rows)
    for epoch in (first, second):
        assert sorted(name for step in epoch for name in step) == keys
    assert first != second
    again = plan(rows, tokenizer, epochs=2, **more)
    assert [again.step(i) for i in (7, 0)] == [made.step(i) for i in (7, 0)], "a step needs no step before it"
    assert names(plan(rows, tokenizer, seed=1, **more).step(0)) != first[0]


@pytest.mark.parametrize(("recipe", "copies"), [("observer", 1), ("legacy", 0)])
def test_fixed_batches_have_so_many_pool_rows_and_their_copies_beside_them(rows, tokenizer, recipe, copies):
    batches = plan(rows, tokenizer, recipe).step(0)
    assert [sum(item.label for item in batch) for batch in batches] == [4, 4]
    for batch in batches:
        assert sum(not item.label for item in batch) == copies * 4
        assert {item.row for item in batch} == {item.row for item in batch if item.label}
    lengths = [max(len(item.encoded) for item in batch if item.label) for batch in batches]
    assert lengths == sorted(lengths, reverse=True), "what does not fit into memory fails at once"


@pytest.mark.parametrize("recipe", ["observer", "legacy"])
def test_a_token_budget_bounds_what_is_computed(rows, tokenizer, recipe):
    made = plan(rows, tokenizer, recipe, token_budget=300, per_device_batch_size=1)
    for step in range(made.per_epoch):
        for batch in made.step(step):
            assert len(batch) * max(len(item.encoded) for item in batch) <= 300
    assert any(sum(item.label for item in batch) > 1 for batch in made.step(0))


def test_length_grouping_saves_padding(rows, tokenizer):
    assert padding(plan(rows, tokenizer, "legacy", group_by_length=True)) < padding(plan(rows, tokenizer, "legacy"))


def test_copies_are_made_anew_in_every_epoch_as_many_as_asked_for(rows, tokenizer):
    made = plan(rows[:8], tokenizer, ratio=2)
    first, second = made.step(0), made.step(1)

    def copies(batches):
        return {(item.row, tuple(item.encoded.input_ids)) for batch in batches for item in batch if not item.label}

    assert len([item for batch in first for item in batch if not item.label]) == 16
    assert not copies(first) & copies(second)


def test_tensors_are_padded_on_the_right(rows, tokenizer):
    made = plan(rows, tokenizer, "legacy", quality_loss_type="contrastive")
    items = made.step(0)[0]
    batch = made.tensors(items, torch.device("cpu"))
    for i, item in enumerate(items):
        n = len(item.encoded)
        assert batch.ids[i, :n].tolist() == item.encoded.input_ids
        assert batch.mask[i].tolist() == [1] * n + [0] * (batch.ids.shape[1] - n)
        assert batch.answer[i, :n].bool().tolist() == item.encoded.answer
        assert (batch.labels[i, n:] == template.IGNORED).all()
        assert batch.rows[i] == item.label
    assert made.learned(items[0].encoded) == sum(y != template.IGNORED for y in batch.labels[0, 1:].tolist())
    assert plan(rows, tokenizer).tensors(items, torch.device("cpu")).labels is None, "no cross-entropy is computed"


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("mask", [True, False])
def test_labels_are_those_of_the_mode_that_is_asked_for(rows, tokenizer, full, mask):
    made = plan(rows, tokenizer, "legacy", full_sequence_prediction=full, mask_special_tokens=mask)
    items = made.step(0)[0]
    labels = made.tensors(items, torch.device("cpu")).labels
    for item, line in zip(items, labels.tolist(), strict=True):
        e = item.encoded
        assert line[: len(e)] == template.labels(e, full, mask)
        answers = [i for i, answer in enumerate(e.answer) if answer]
        assert all(line[i] == e.input_ids[i] for i in answers)
        asked = [i for i, user in enumerate(e.user) if user]
        assert all((line[i] == e.input_ids[i]) == full for i in asked)
        assert made.learned(e) == sum(label != template.IGNORED for label in line[1:])
    sizes = {
        plan(rows, tokenizer, "legacy", full_sequence_prediction=full, mask_special_tokens=m).learned(e)
        for m in (False, True)
    }
    assert len(sizes) == 1 + full, "role tags are learned or not; where answers alone are, they are not"


def test_spec7_20_what_is_trained_on_is_what_is_routed(rows, tokenizer, tmp_path):
    """The tokens and the answer mask of `warmup` are those that `route` stores and reads."""
    items = {item.row: item.encoded for batch in plan(rows, tokenizer).step(0) for item in batch if item.label}
    assert items
    store = token_store.write(tmp_path / "tokens", "key", rows, len(rows), tokenizer, 128)
    for at, row in enumerate(rows):
        if encoded := items.get(f"{row.dataset}:{row.id}"):
            ids, kinds = store.read(at)
            assert ids.tolist() == encoded.input_ids
            assert (kinds == template.Kind.ASSISTANT).tolist() == encoded.answer


def test_rows_without_anything_to_learn_are_left_out_or_an_error(rows, tokenizer):
    begins = template.encode_many(rows, tokenizer, 128)
    cut = max(e.answer.index(True) for e in begins)
    kept = plan(rows, tokenizer, max_length=cut).rows
    assert 0 < len(kept) == sum(e.answer.index(True) < cut for e in begins) < len(rows)
    with pytest.raises(UserError, match=r"no warm-up row has a token to learn: raise training\.max_length"):
        plan(rows, tokenizer, max_length=1)
