"""pytest tests/unit/test_warmup.py"""

import json
import time
from pathlib import Path

import pytest
import torch

from selectmoe import convert, gate_training, pool, template, warmup
from selectmoe.config import load
from selectmoe.errors import UserError
from selectmoe.manifest import read_manifest
from selectmoe.modeling import load_judge
from selectmoe.router_weights import read_router_weights, router_parameters
from selectmoe.storage import LocalStore


@pytest.fixture(scope="module")
def observer(small_judge):
    return small_judge("observer")


@pytest.fixture(scope="module")
def applied(small_judge):
    return small_judge("applied")


def config(judge, pool, folder, recipe="observer", **training):
    fields = {"epochs": 1, "batch_size": 8, "per_device_batch_size": 4, "rows": 16, "learning_rate": 0.05, **training}
    given = {"selector_model.path": judge, "data": str(pool), "output_dir": str(folder)}
    return load(warmup.WarmupConfig, {"recipe": recipe, "threads": 1, "training": fields}, **given)


def metric(out, name):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in lines if entry["name"] == name]


def last(out, name):
    return metric(out, name)[-1]["value"]


def test_observers_learn_to_tell_rows_from_corrupted_copies(observer, small_pool, tmp_path):
    more = {"epochs": 6, "learning_rate": 0.1, "corruptions": ["random_chars"]}
    out = warmup.run(config(observer, small_pool, tmp_path / "w", **more))
    assert last(out, "good_ratio/pool") > last(out, "good_ratio/corrupted") + 0.02
    weights = read_router_weights(out)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert len((out / "warmup_rows.jsonl").read_text().splitlines()) == 16


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("observer", {}),
        ("legacy", {}),
        ("observer", {"token_budget": 256, "per_device_batch_size": 1, "max_length": 64, "group_by_length": True}),
        ("observer", {"precision": "mixed", "scheduler": "cosine", "warmup_ratio": 0.3, "weight_decay": 0.1}),
        (
            "legacy",
            {"mode": "lora", "train_routers": False, "lora": {"dropout": 0.2, "target_modules": ["q_proj", "v_proj"]}},
        ),
    ],
    ids=["observer", "legacy", "token budget, grouped", "mixed, cosine", "lora with dropout"],
)
def test_spec7_10_an_interrupted_warm_up_goes_on_to_the_same_bytes(
    observer, small_olmoe, small_pool, tmp_path, monkeypatch, recipe, more
):
    judge = observer
    if recipe == "legacy":  # a trash expert's noise must be the same after the restart too
        model = {"gate_mode": "applied", "trash_expert_mode": "noise"}
        given = {"source_model": str(small_olmoe), "output_dir": str(tmp_path / "judge")}
        judge = str(convert.run(load(convert.ConvertConfig, {"model": model}, **given)))
    whole = warmup.run(config(judge, small_pool, tmp_path / "a", recipe, epochs=2, **more))
    monkeypatch.setattr(gate_training, "COMMIT_SECONDS", -1.0)
    real = LocalStore.put_bytes

    class Power(Exception):
        pass

    def put_then_fail(self, name, data):
        real(self, name, data)
        if name == gate_training.STATE:
            raise Power

    monkeypatch.setattr(LocalStore, "put_bytes", put_then_fail)
    resumed = config(judge, small_pool, tmp_path / "b", recipe, epochs=2, **more)
    with pytest.raises(Power):
        warmup.run(resumed)
    monkeypatch.setattr(LocalStore, "put_bytes", real)
    restarted = time.time()
    assert read_manifest(warmup.run(resumed)).identity == read_manifest(whole).identity
    losses = metric(tmp_path / "b", "loss")
    assert [entry["step"] for entry in losses] == [0, 1, 2, 3]
    # It went on from the commit: a training from the start would give the same bytes too.
    assert [entry["step"] for entry in losses if entry["time"] < restarted] == [0]


@pytest.mark.parametrize("loss", ["sigmoid", "mse"])
def test_spec7_01_the_quality_loss_moves_the_gates(applied, small_pool, tmp_path, loss):
    """A larger weight gives a smaller mean g after the same steps: the loss has a gradient."""
    good = []
    for weight in (0.0, 1.0, 100.0):
        fields = {"quality_loss_type": loss, "quality_loss_weight": weight, "learning_rate": 1e-3, "epochs": 3}
        out = warmup.run(config(applied, small_pool, tmp_path / f"{weight}", "legacy", **fields))
        good.append(last(out, "good_ratio/pool"))
        assert last(out, "quality_loss_weight/effective") == pytest.approx(0.01 * weight)
    assert good[0] > good[1] > good[2]


def test_the_legacy_recipe_trains_routers_too(applied, small_pool, tmp_path):
    before = read_router_weights(warmup.run(config(applied, small_pool, tmp_path / "a", "legacy", learning_rate=1e-9)))
    after = read_router_weights(warmup.run(config(applied, small_pool, tmp_path / "b", "legacy")))
    assert all(not torch.allclose(before[name], after[name], atol=1e-5) for name in before)


@pytest.mark.parametrize("recipe", ["observer", "legacy"])
def test_spec7_09_a_bfloat16_model_swallows_no_small_step(observer, applied, small_pool, tmp_path, monkeypatch, recipe):
    """Steps of 1e-5 on weights of 0.02 are far below bfloat16's resolution."""
    monkeypatch.setattr(gate_training, "default_dtype", lambda device: torch.bfloat16)
    judge = observer if recipe == "observer" else applied
    out = warmup.run(config(judge, small_pool, tmp_path / "w", recipe, learning_rate=1e-5))
    before = router_parameters(load_judge(judge, "cpu", torch.bfloat16))
    moved = {".quality_gate."} if recipe == "observer" else {".quality_gate.", ".mlp.gate."}
    for name, tensor in read_router_weights(out).items():
        if any(part in name for part in moved):
            assert tensor.dtype == torch.float32
            assert 0 < float((tensor - before[name].detach().float()).abs().max()) < 1e-4
        else:
            assert torch.equal(tensor, before[name].detach())


def test_the_routers_of_an_observer_are_written_unchanged(observer, small_pool, tmp_path):
    weights = read_router_weights(warmup.run(config(observer, small_pool, tmp_path / "w")))
    before = router_parameters(load_judge(observer, "cpu", torch.float32))
    assert all(torch.equal(weights[name], before[name]) == (".mlp." in name) for name in before)


def test_spec7_11_rows_with_nothing_to_learn_are_dropped_with_the_reason(observer, small_pool, tmp_path):
    lengths = sorted(
        e.answer.index(True)
        for e in template.encode_many(pool.read_pool(pool.locate(small_pool)), template.load_tokenizer(observer), 512)
    )
    cut = lengths[-1]
    out = warmup.run(config(observer, small_pool, tmp_path / "w", rows=0, max_length=cut))
    rows = read_manifest(out).rows
    assert rows["dropped"] == {"nothing to learn": sum(n >= cut for n in lengths)}
    assert rows["out"] == len((out / "warmup_rows.jsonl").read_text().splitlines()) > 0
    assert all(tensor.isfinite().all() for tensor in read_router_weights(out).values())


def test_spec7_08_micro_batches_do_not_change_the_training_beyond_rounding(observer, small_pool, tmp_path):
    """The loss is a mean over the step's rows however they are shared out."""
    one, many = (
        read_router_weights(
            warmup.run(config(observer, small_pool, tmp_path / str(n), per_device_batch_size=n, learning_rate=1e-3))
        )
        for n in (1, 8)
    )
    assert all(torch.allclose(one[name], many[name], atol=2e-4) for name in one)


def test_the_number_of_threads_changes_no_byte(observer, small_pool, tmp_path):
    ids = set()
    for threads in (1, 2):
        made = config(observer, small_pool, tmp_path / str(threads))
        made.threads = threads
        ids.add(read_manifest(warmup.run(made)).identity)
    assert len(ids) == 1


def test_an_unknown_loss_is_refused_before_any_work(applied, small_pool, tmp_path):
    with pytest.raises(UserError, match="did you mean sigmoid"):
        warmup.run(config(applied, small_pool, tmp_path / "w", "legacy", quality_loss_type="sigmiod"))
    assert not (tmp_path / "w").exists()


def test_spec7_11_rows_without_a_learnable_token_are_an_error(observer, small_pool, tmp_path):
    with pytest.raises(UserError, match="max_length"):
        warmup.run(config(observer, small_pool, tmp_path / "w", max_length=2))
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("training", "recipe", "word"),
    [
        ({"batch_size": 8, "per_device_batch_size": 3}, "observer", "per_device_batch_size"),  # SPEC 7 (8)
        ({"batch_size": 0}, "observer", "batch_size"),
        ({"train_gates": False}, "observer", "nothing would be trained"),
        ({"corruptions": ["magic"]}, "observer", "magic"),
        ({"subset_ratio": 0.0}, "observer", "subset_ratio"),
        ({"learning_rate": 2.0}, "observer", "learning_rate"),
        ({"quality_loss_weight": 0.0}, "observer", "nothing would be trained"),
        ({"quality_loss_weight": float("inf")}, "legacy", "quality_loss_weight"),
        ({"enable_load_balancing": True}, "observer", "enable_load_balancing"),
        ({"full_sequence_prediction": False}, "observer", "full_sequence_prediction"),
        ({"ratio": 2}, "legacy", "ratio"),
        ({"train_gates": False, "train_routers": False}, "legacy", "nothing would be trained"),
        ({}, "magic", "magic"),
        ({"quality_loss_params": {"lambda_var": 1}}, "legacy", "unknown key 'lambda_var'"),
        ({"quality_loss_params": {"target": 2}, "quality_loss_type": "mse"}, "legacy", "target=2 must be at least 0"),
        ({"mode": "ia3"}, "legacy", "full_rank, lora"),
        ({"scheduler": "step"}, "observer", "linear, cosine, constant"),
        ({"precision": "int8"}, "observer", "float32, bfloat16, mixed"),
        ({"max_grad_norm": -1.0}, "observer", "max_grad_norm"),
        ({"warmup_ratio": 1.0}, "observer", "warmup_ratio"),
        ({"token_budget": 1024, "max_length": 1024, "per_device_batch_size": 1}, "observer", "at least 2048"),
        ({"token_budget": 4096, "max_length": 16}, "observer", "per_device_batch_size"),
        ({"gradient_checkpointing": True}, "observer", "gradient_checkpointing"),
        ({"eval_every": 3}, "observer", "holdout="),
        ({"lora": {"r": 4}}, "legacy", "training.mode=lora"),
        ({"mode": "lora"}, "observer", "train_routers"),
        ({"mode": "lora", "lora": {"dropout": 0.1}}, "legacy", "dropout"),
        ({"mode": "lora", "lora": {"r": 0}}, "legacy", "above 0"),
        ({"quality_loss_type": "os:getcwd"}, "legacy", r"allow_code=\[\] must be what is named .*os:getcwd"),
    ],
)
def test_bad_values_are_refused(training, recipe, word, tmp_path):
    with pytest.raises(UserError, match=word):
        config("m", "d", tmp_path / "o", recipe, **training)


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"max_length": 100000}, "100000 is over the .* positions"),
        ({"mode": "lora", "lora": {"target_modules": ["query"]}}, "the judge has no query; it has .*q_proj"),
        ({"rows": 1000}, "the pool has 36"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(applied, small_pool, tmp_path, training, said):
    with pytest.raises(UserError, match=said):
        warmup.run(config(applied, small_pool, tmp_path / "w", "legacy", **training))
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 10}, "the tokenizer of .* has 320 tokens, its model's embedding 10 rows"),
        ({"quality_loss_type": "os:getcwd"}, "names code, which no checkpoint may: write sigmoid there"),
        ({"quality_loss_type": "magic"}, "'magic' is unknown"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_refused(observer, small_pool, tmp_path, change, said):
    judge = tmp_path / "judge"
    judge.mkdir()
    for file in Path(observer).iterdir():
        if file.name != "manifest.json":
            (judge / file.name).symlink_to(file)
    (judge / "config.json").unlink()
    (judge / "config.json").write_text(json.dumps(json.loads((Path(observer) / "config.json").read_text()) | change))
    with pytest.raises(UserError, match=said):
        warmup.run(config(str(judge), small_pool, tmp_path / "w"))
    assert not (tmp_path / "w").exists()


def test_spec7_08_fewer_micro_batches_than_processes_are_refused(observer, small_pool, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    given = config(observer, small_pool, tmp_path / "w", batch_size=2, per_device_batch_size=1, distributed="ddp")
    with pytest.raises(UserError, match=r"batch_size=2 makes 2 micro-batches .* for 4 processes"):
        warmup.run(given)


def test_a_recipe_needs_its_gate_mode(observer, small_pool, tmp_path):
    with pytest.raises(UserError, match="gate_mode=applied"):
        warmup.run(config(observer, small_pool, tmp_path / "w", "legacy"))


def test_datasets_are_ingested_where_no_pool_is_given(observer, small_pool, tmp_path):
    """A fortieth of them by default, as the predecessor had it; the pool is gone with the work."""
    fields = {"training": {"rows": 0, "batch_size": 4, "epochs": 1}, "dataset": {"local": {"dataset_names": ["a"]}}}
    given = {"selector_model.path": observer, "output_dir": str(tmp_path / "w")}
    given["dataset.local.data_dir"] = str(Path(small_pool).parent / "data")
    out = warmup.run(load(warmup.WarmupConfig, fields, **given))
    assert read_manifest(out).rows == {"in": 20, "out": 1, "dropped": {"not a warm-up row": 19}}
    assert not (out / ".work").exists()
    with pytest.raises(UserError, match=r"dataset\.\* is read without data= only"):
        load(warmup.WarmupConfig, fields, data=str(small_pool), **given)
    given["dataset.local.data_dir"] = str(tmp_path / "nowhere")
    given["output_dir"] = str(tmp_path / "v")
    with pytest.raises(UserError, match="does not exist"):
        warmup.run(load(warmup.WarmupConfig, fields, **given))
    assert not (tmp_path / "v").exists()
