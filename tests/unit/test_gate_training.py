"""The loop of warm-up: what it logs, freezes, refuses and repeats. `pytest tests/unit/test_gate_training.py`"""

import csv
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from selectmoe import convert, gate_training, pool, warmup
from selectmoe.config import load
from selectmoe.errors import UserError
from selectmoe.losses import LOSSES
from selectmoe.manifest import read_manifest
from selectmoe.modeling import load_judge
from selectmoe.router_weights import load_router_weights, read_router_weights
from selectmoe.template import encode_many, load_tokenizer


@pytest.fixture(scope="module")
def judges(small_judge):
    return {"observer": small_judge("observer"), "legacy": small_judge("applied")}


def config(judges, data, folder, recipe="observer", judge=None, holdout="", **training):
    fields = {"epochs": 1, "batch_size": 8, "per_device_batch_size": 8, "rows": 16, "learning_rate": 0.01, **training}
    given = {"selector_model.path": judge or judges[recipe], "data": str(data), "output_dir": str(folder)}
    if holdout:
        given["holdout"] = str(holdout)
    return load(warmup.WarmupConfig, {"recipe": recipe, "threads": 1, "training": fields}, **given)


def numbers(out):
    """Name -> step -> value."""
    found = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        found.setdefault(entry["name"], {})[entry["step"]] = entry["value"]
    return found


@pytest.fixture(scope="module")
def rich(judges, small_pool, tmp_path_factory):
    """A legacy run with everything that can be logged."""
    more = {"enable_load_balancing": True, "quality_loss_weight": 3.0, "eval_every": 1, "scheduler": "cosine"}
    folder = tmp_path_factory.mktemp("rich") / "w"
    return warmup.run(config(judges, small_pool, folder, "legacy", holdout=small_pool, **more))


@pytest.fixture(scope="module")
def plain(judges, small_pool, tmp_path_factory):
    """The default recipe, evaluated."""
    folder = tmp_path_factory.mktemp("plain") / "w"
    kinds = {"corruptions": ["random_chars"], "epochs": 6, "learning_rate": 0.1}
    return warmup.run(config(judges, small_pool, folder, holdout=small_pool, **kinds))


def test_loss_parts_and_the_weights_in_force_are_logged_at_every_step(rich):
    found = numbers(rich)
    for name in ("loss", "loss/cross_entropy", "loss/quality", "loss/load_balancing", "gradient_norm", "learning_rate"):
        assert set(found[name]) == {0, 1}, name
    for step in (0, 1):
        assert found["quality_loss_weight"][step] == 3
        assert found["quality_loss_weight/effective"][step] == pytest.approx(0.03)
        assert found["load_balancing_weight/effective"][step] == pytest.approx(0.01)
        parts = 0.03 * found["loss/quality"][step] + 0.01 * found["loss/load_balancing"][step]
        assert found["loss"][step] == pytest.approx(found["loss/cross_entropy"][step] + parts, abs=1e-5)
        assert found["tokens/padded"][step] >= found["tokens"][step] > 0
    assert found["learning_rate"][1] == pytest.approx(0.005)


def test_spec7_04_load_balancing_is_on_when_it_is_on(rich, judges, small_pool, tmp_path):
    """It has a value (at least K = 2 by its definition), and the routers move otherwise than without it."""
    assert all(value >= 1.9 for value in numbers(rich)["loss/load_balancing"].values())
    more = {"quality_loss_weight": 3.0, "scheduler": "cosine"}
    without = warmup.run(config(judges, small_pool, tmp_path / "w", "legacy", **more))
    assert "loss/load_balancing" not in numbers(without)
    one, two = read_router_weights(rich), read_router_weights(without)
    assert all(not torch.equal(one[name], two[name]) for name in one if ".mlp." in name)


def test_the_mean_gate_of_every_layer_and_step_is_a_table_and_a_plot(rich, plain):
    for out in (rich, plain):
        with open(out / "gates.csv") as file:
            table = list(csv.DictReader(file))
        mean = numbers(out)["good_ratio/pool"]
        assert [int(line["step"]) for line in table] == sorted(mean)
        for line in table:
            layers = [float(line[f"layer_{i}"]) for i in range(2)]
            assert sum(layers) / 2 == pytest.approx(mean[int(line["step"])], abs=1e-5)
        assert (out / "gates.png").read_bytes().startswith(b"\x89PNG")


def test_held_out_rows_are_evaluated_before_and_after(rich, plain):
    assert set(numbers(rich)["eval/loss/cross_entropy"]) == {0, 1, 2}
    found = numbers(plain)
    assert set(found["eval/loss/quality"]) == {0, 2, 4, 6, 8, 10, 12}
    assert found["eval/loss/quality"][12] < found["eval/loss/quality"][0]
    assert found["eval/auc"][12] > found["eval/auc"][0]
    assert found["eval/good_ratio/pool"][12] > found["eval/good_ratio/corrupted"][12]


def test_a_trained_observer_is_applied_with_the_order_of_its_scores_and_keeps_most_of_the_model(
    plain, judges, small_pool, tmp_path
):
    """Gates begin at +3; `contrastive` brings their scores to about 0, so that 0.3 and +3 open them to about 0.95."""
    given = {"source_model": judges["observer"], "apply.weights": str(plain), "output_dir": str(tmp_path / "applied")}
    made = convert.run(load(convert.ConvertConfig, {"apply": {"gain": 0.3}}, **given))
    observer, applied = (load_judge(path, "cpu", torch.float32) for path in (judges["observer"], made))
    load_router_weights(observer, str(plain))
    rows = pool.read_pool(pool.locate(small_pool))
    ids = [torch.tensor([e.input_ids]) for e in encode_many(rows, load_tokenizer(made), 512)]
    with torch.no_grad():
        before, after = (
            torch.cat([model(i, output_router_logits=True).quality_score[0].flatten() for i in ids])
            for model in (observer, applied)
        )
    assert abs(float(before.mean())) < 1.5
    assert torch.allclose(after, 0.3 * before + 3.0, atol=1e-5)
    assert 0.93 < float(after.sigmoid().mean()) < 0.97


def test_what_is_frozen_is_proved_unchanged(rich, plain):
    for out, trained in ((rich, 6), (plain, 4)):
        proof = json.loads((out / "warmup.json").read_text())
        assert proof["frozen"]["sha256_before"] == proof["frozen"]["sha256_after"]
        assert len(proof["trained"]) == trained
        assert proof["frozen"]["tensors"] + trained >= 29
        assert proof["micro_batches_per_process"] == 1


@pytest.mark.parametrize("recipe", ["observer", "legacy"])
def test_a_frozen_tensor_that_changes_is_our_fault(judges, small_pool, tmp_path, monkeypatch, recipe):
    real = gate_training.GateTraining._step

    def slip(self, step):
        self.model.model.layers[0].mlp.experts.down_proj.data[0, 0, 0] += 1e-6
        return real(self, step)

    monkeypatch.setattr(gate_training.GateTraining, "_step", slip)
    with pytest.raises(RuntimeError, match="changed a frozen tensor"):
        warmup.run(config(judges, small_pool, tmp_path / "w", recipe))
    assert not (tmp_path / "w" / "manifest.json").exists()


def trainer(judges, small_pool, tmp_path, recipe="observer", uneven=False, **training):
    """A training that was set up and not begun; of rows of very different lengths where they are to be uneven."""

    class Out:
        leads = True

    given = config(judges, small_pool, tmp_path / "w", recipe, **training)
    rows = pool.read_pool(pool.locate(small_pool))[:8]
    for n, row in enumerate(rows if uneven else []):
        row.messages[1]["content"] += " and then" * (3 * n)
    return gate_training.GateTraining(given, rows, [], Out())


def test_observers_are_trained_without_a_graph_through_the_model(judges, small_pool, tmp_path):
    made = trainer(judges, small_pool, tmp_path)
    seen = []
    made.model.model.norm.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    made.model.lm_head.register_forward_hook(lambda *_: seen.append("lm_head"))
    numbers = made._step(0)
    assert seen == [False], "one forward pass, no graph at its end, no logits"
    assert math.isfinite(numbers["loss"])
    assert all(p.grad.abs().max() > 0 for p in made.parameters.values())


@pytest.mark.parametrize("recipe", ["observer", "legacy"])
def test_the_optimizer_holds_state_for_the_trained_parameters_alone(judges, small_pool, tmp_path, recipe):
    made = trainer(judges, small_pool, tmp_path, recipe)
    made._step(0)
    made.optimizer.step()
    trained = sum(p.numel() for p in made.parameters.values())
    layers, hidden, experts = 2, 32, 4
    assert trained == layers * (hidden + 1 + (experts * hidden if recipe == "legacy" else 0))
    moments = [t for state in made.optimizer.state.values() for name, t in state.items() if name != "step"]
    assert sum(t.numel() for t in moments) == 2 * trained
    assert {t.dtype for t in (*moments, *made.parameters.values())} == {torch.float32}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("recipe", ["observer", "legacy"])
def test_spec7_01_02_every_loss_in_every_mode_gives_the_gates_a_gradient(judges, small_pool, tmp_path, recipe, loss):
    """With gradient checkpointing the same one, where there is a backward pass through the model."""
    grads = []
    for checkpointing in (False, True)[: 2 if recipe == "legacy" else 1]:
        made = trainer(
            *(judges, small_pool, tmp_path, recipe),
            **{"quality_loss_type": loss, "gradient_checkpointing": checkpointing, "quality_loss_weight": 1e6},
        )
        made._step(0)
        grads.append({name: p.grad for name, p in made.parameters.items() if "quality_gate" in name})
        assert all(g.isfinite().all() and g.abs().max() > 0 for g in grads[-1].values())
    assert all(torch.allclose(grads[0][name], grads[-1][name], rtol=1e-4) for name in grads[0])


def test_spec7_05_losses_differ_in_what_they_train(judges, small_pool, tmp_path):
    """No name silently becomes another: every loss gives other gates."""
    weights = []
    for loss in sorted(LOSSES):
        made = trainer(judges, small_pool, tmp_path, "observer", quality_loss_type=loss)
        for parameter in made.parameters.values():  # where all scores are alike, so are several losses' gradients
            torch.nn.init.normal_(parameter.data, generator=torch.Generator().manual_seed(parameter.numel()))
        made._step(0)
        weights.append(made.parameters["model.layers.0.quality_gate.weight"].grad)
    for i, one in enumerate(weights):
        assert all(not torch.allclose(one, other, rtol=1e-3, atol=0) for other in weights[:i])


def test_parameters_of_a_loss_are_read(judges, small_pool, tmp_path):
    grads = []
    for target in (0.0, 1.0):
        more = {"quality_loss_type": "mse", "quality_loss_params": {"target": target}}
        made = trainer(judges, small_pool, tmp_path, "legacy", **more, quality_loss_weight=1e6)
        made._step(0)
        grads.append(made.parameters["model.layers.0.quality_gate.bias"].grad)
    assert grads[0] > 0 > grads[1]


def test_a_mean_over_tokens_stays_one_however_it_is_cut(judges, small_pool, tmp_path):
    grads = []
    for size in (1, 8):
        params = {"sample_wise_averaging": False}
        made = trainer(
            *(judges, small_pool, tmp_path),
            **{"quality_loss_type": "sigmoid", "quality_loss_params": params, "per_device_batch_size": size},
        )
        made._step(0)
        grads.append(made.parameters["model.layers.0.quality_gate.weight"].grad)
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss", ["sigmoid", "contrastive"])
def test_spec7_08_the_cross_entropy_is_a_mean_over_the_tokens_of_the_whole_step(judges, small_pool, tmp_path, loss):
    """Rows of very different lengths weigh by their tokens, however they are shared out over micro-batches."""
    found = []
    for size in (1, 8):
        made = trainer(
            *(judges, small_pool, tmp_path, "legacy"),
            **{"quality_loss_type": loss, "per_device_batch_size": size},
            uneven=True,
        )
        told = made._step(0)
        learned = [made.plan.learned(encoded) for encoded in made.plan.encoded]
        assert max(learned) > 3 * min(learned)
        found.append((told["loss/cross_entropy"], {name: p.grad for name, p in made.parameters.items()}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, one in found[0][1].items():
        assert torch.allclose(one, found[1][1][name], rtol=1e-4, atol=1e-4 * float(one.abs().max())), name


def test_weight_decay_shrinks_the_weights_by_rate_times_decay(judges, small_pool, tmp_path):
    after = []
    for decay in (0.0, 0.5):
        made = trainer(judges, small_pool, tmp_path, weight_decay=decay)
        before = {name: p.detach().clone() for name, p in made.parameters.items()}
        made._step(0)
        made.optimizer.step()
        after.append({name: p.detach() for name, p in made.parameters.items()})
    for name, start in before.items():
        torch.testing.assert_close(after[0][name] - after[1][name], 0.01 * 0.5 * start, rtol=1e-2, atol=1e-6)


def test_the_optimizer_steps_with_the_rate_that_is_logged(judges, small_pool, tmp_path, monkeypatch):
    used, real = [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        used.append({group["lr"] for group in self.param_groups})
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    given = config(judges, small_pool, tmp_path / "w", epochs=2, scheduler="cosine", warmup_ratio=0.5)
    told = numbers(warmup.run(given))["learning_rate"]
    assert used == [{told[n]} for n in range(4)]
    assert len(set(told.values())) > 2


def test_gradients_are_clipped_to_the_norm_that_is_asked_for(judges, small_pool, tmp_path):
    for limit in (0.0, 1e-3):
        made = trainer(judges, small_pool, tmp_path, max_grad_norm=limit)
        made._step(0)
        before = made._clip()
        norm = float(torch.stack([p.grad.norm() for p in made.parameters.values()]).norm())
        assert before > 1e-3
        assert norm == pytest.approx(limit or before, rel=1e-3)


@pytest.mark.parametrize("precision", ["bfloat16", "mixed"])
@pytest.mark.parametrize("recipe", ["observer", "legacy"])
def test_lower_precision_trains_float32_masters(judges, small_pool, tmp_path, recipe, precision):
    out = warmup.run(config(judges, small_pool, tmp_path / "w", recipe, precision=precision, rows=8))
    assert all(math.isfinite(value) for value in numbers(out)["loss"].values())
    trained = json.loads((out / "warmup.json").read_text())["trained"]
    assert all(read_router_weights(out)[name].dtype == torch.float32 for name in trained)


@pytest.mark.parametrize(
    ("precision", "weights", "computed"),
    [
        ("float32", torch.float32, torch.float32),
        ("bfloat16", torch.bfloat16, torch.bfloat16),
        ("mixed", torch.float32, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("recipe", ["observer", "legacy"])
def test_precision_is_what_the_frozen_model_is_kept_and_computed_in(
    judges, small_pool, tmp_path, recipe, precision, weights, computed
):
    made = trainer(judges, small_pool, tmp_path, recipe, precision=precision)
    layer, seen = made.model.model.layers[1].self_attn.q_proj, []
    layer.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    made._step(0)
    assert (layer.weight.dtype, set(seen)) == (weights, {computed})
    assert {p.grad.dtype for p in made.parameters.values()} == {torch.float32}


@pytest.mark.parametrize(("checkpointing", "times"), [(False, 1), (True, 2)])
def test_gradient_checkpointing_computes_every_layer_twice(judges, small_pool, tmp_path, checkpointing, times):
    made = trainer(judges, small_pool, tmp_path, "legacy", gradient_checkpointing=checkpointing)
    seen = []
    for n, layer in enumerate(made.model.model.layers):
        layer.mlp.register_forward_hook(lambda module, args, out, n=n: seen.append(n))
    made._step(0)
    assert sorted(seen) == sorted([0, 1] * times)


@pytest.mark.parametrize("field", [{"gradient_checkpointing": True}, {"eval_every": 1, "eval_rows": 2}])
def test_execution_fields_change_no_byte(rich, judges, small_pool, tmp_path, field):
    more = {"enable_load_balancing": True, "quality_loss_weight": 3.0, "scheduler": "cosine", **field}
    again = warmup.run(config(judges, small_pool, tmp_path / "w", "legacy", holdout=small_pool, **more))
    assert read_manifest(again).identity == read_manifest(rich).identity


@pytest.mark.parametrize("recipe", ["observer", "legacy"])
def test_a_training_that_diverges_names_the_rows(judges, small_pool, tmp_path, recipe):
    """A token that only some rows hold has an embedding that is not finite: those rows are named, and no others."""
    judge, tokenizer = tmp_path / "judge", load_tokenizer(judges[recipe])
    shutil.copytree(judges[recipe], judge, ignore=shutil.ignore_patterns("manifest.json"))
    kinds = {"corruptions": ["truncated"]} if recipe == "observer" else {}
    given = config(judges, small_pool, tmp_path / "w", recipe, str(judge), **kinds)
    rows = warmup.choose_rows(pool.read_pool(pool.locate(small_pool)), given)
    holders = {}
    for row, encoded in zip(rows, encode_many(rows, tokenizer, 512), strict=True):
        for token in set(encoded.input_ids):
            holders.setdefault(token, set()).add(f"{row.dataset}:{row.id}")
    token, bad = min(holders.items(), key=lambda entry: (len(entry[1]), entry[0]))
    weights = load_file(judge / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = math.nan
    save_file(weights, judge / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"is not finite at step \d+, rows .*lower training\.learning_rate") as caught:
        warmup.run(given)
    said = str(caught.value).split("rows ")[1].split(": lower")[0]
    assert set(said.split(", ")) <= bad
    assert not (tmp_path / "w").exists()


def own_loss(good, mask):
    return (good * mask).sum() / mask.sum()


def test_a_loss_of_ones_own_trains_and_its_source_counts(judges, small_pool, tmp_path):
    path = f"{__name__}:own_loss"
    given = config(judges, small_pool, tmp_path / "w")
    given.training.quality_loss_type, given.allow_code = path, [path]
    out = warmup.run(given)
    assert read_manifest(out).inputs["loss"]["uri"] == path
    assert json.loads((out / "warmup.json").read_text())["loss"]["name"] == path
    found = numbers(out)["loss/quality"]
    assert found[1] < found[0]
    given.allow_code, given.output_dir = [], str(tmp_path / "v")
    with pytest.raises(UserError, match="allow_code"):
        warmup.run(given)


def test_an_observer_with_routers_learns_them_from_the_text_and_gates_from_their_loss(judges, small_pool, tmp_path):
    """The gate only reads: no part of the cross-entropy reaches it."""
    for weight in (0.0, 1.0):
        more = {"train_routers": True, "quality_loss_weight": weight}
        made = trainer(judges, small_pool, tmp_path, "observer", **more)
        numbers = made._step(0)
        assert numbers["loss/cross_entropy"] > 1
        for name, parameter in made.parameters.items():
            moved = parameter.grad is not None and float(parameter.grad.abs().max()) > 0
            assert moved == (".mlp." in name or weight > 0), name


def test_applied_gates_alone_can_be_trained(judges, small_pool, tmp_path):
    made = trainer(judges, small_pool, tmp_path, "legacy", train_routers=False)
    made._step(0)
    assert all("quality_gate" in name and p.grad.abs().max() > 0 for name, p in made.parameters.items())
