"""Routing with a tiny judge made on the fly: `pytest tests/unit/test_route.py`."""

from __future__ import annotations

import json
import random
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from selectmoe import judge as judging
from selectmoe import merge, route, routing, token_store
from selectmoe.config import load
from selectmoe.errors import Unavailable, UserError
from selectmoe.legacy_router_data import EXPORTED
from selectmoe.manifest import find_manifests, read_manifest, sha256_file, write_manifest
from selectmoe.merge import MergeConfig
from selectmoe.pool import Row, read_pool
from selectmoe.route import RouteConfig
from selectmoe.router_data import RouterData, read_router_data
from selectmoe.scores import score
from selectmoe.template import encode, encode_answer_only, load_tokenizer
from tests.pools import make_pool
from tests.unit.s3_faults import Fault, Proxy

LAYERS, EXPERTS = 2, 4
WORDS = [
    "the",
    "router",
    "sends",
    "every",
    "token",
    "to",
    "few",
    "of",
    "its",
    "experts",
    "and",
    "the",
    "gate",
    "says",
    "how",
    "good",
    "it",
    "is",
]


def finish(folder: Path, stage: str) -> None:
    rows = {"in": 0, "out": 0, "dropped": {}}
    config = {"identity": {"folder": folder.name}, "execution": {}}
    write_manifest(folder, stage=stage, version=1, config=config, inputs={}, rows=rows, environment={}, created="now")


def make_rows(n: int = 41) -> list[Row]:
    rng = random.Random(0)
    rows = []
    for i in range(n):
        question, answer = (" ".join(rng.choices(WORDS, k=rng.randint(1, 9))) for _ in range(2))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if i % 5 == 0:
            messages += [{"role": "user", "content": "and?"}, {"role": "assistant", "content": "über all"}]
        rows.append(Row(f"d{i % 3}", f"r{(i * 7) % n:03d}", messages))
    rows.append(
        Row("d1", "long question", [{"role": "user", "content": "why " * 60}, {"role": "assistant", "content": "so"}])
    )
    return rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with judge/ (checkpoint and tokenizer), warmup/ (other router weights) and pool/."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from selectmoe.modeling import SelectMoeConfig, SelectMoeForCausalLM
    from selectmoe.router_weights import save_router_weights

    root = tmp_path_factory.mktemp("world")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|padding|>")
    torch.manual_seed(0)
    config = SelectMoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        initializer_range=0.3,
        quality_gate_init_std=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = SelectMoeForCausalLM(config)
    model.save_pretrained(str(root / "judge"))
    tokenizer.save_pretrained(str(root / "judge"))
    finish(root / "judge", "convert")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    (root / "warmup").mkdir()
    save_router_weights(model, root / "warmup", tokenizer)
    finish(root / "warmup", "warmup")
    make_pool(root / "pool", make_rows())
    return root


def config_of(world: Path, output: Path, **settings: Any) -> RouteConfig:
    values = {"max_length": 128, "token_budget": 512, "threads": 1} | settings
    paths = {"selector_model.path": str(world / "judge"), "data": str(world / "pool"), "output_dir": str(output)}
    return load(RouteConfig, {}, **{key.replace("__", "."): v for key, v in values.items()}, **paths)


def routed(world: Path, output: Path, **settings: Any) -> Path:
    return route.run(config_of(world, output, **settings))


def merged(shards: list[Path], output: Path) -> Path:
    return merge.run(load(MergeConfig, {"shards": [str(s) for s in shards], "output_dir": str(output)}))


def contents(output: Path) -> dict[str, str]:
    """Every result file with its digest."""
    return {f["path"]: f["sha256"] for f in read_manifest(output).files if f["result"]}


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "route"
    return routed(world, output, nll=True, ifd=True, model_checkpoint_path=str(world / "warmup"))


def reference(world: Path, row: Row, weights: str = "warmup", max_length: int = 128) -> dict[str, Any]:
    """One row by itself, unpadded, in NumPy from the model's raw outputs: the definitions of the specification."""
    from selectmoe.modeling import load_judge
    from selectmoe.router_weights import load_router_weights

    tokenizer = load_tokenizer(world / "judge")
    model = load_judge(str(world / "judge"), torch.device("cpu"), torch.float32)
    if weights:
        load_router_weights(model, str(world / weights))

    def forward(ids: list[int]) -> tuple[Any, np.ndarray]:
        with torch.no_grad():
            ids_ = torch.tensor([ids])
            out = model.model(input_ids=ids_, attention_mask=torch.ones_like(ids_), output_router_logits=True)
            logp = torch.log_softmax(model.lm_head(out.last_hidden_state[0]).double(), -1).numpy()
        return out, logp

    encoded = encode(row.messages, tokenizer, max_length)
    out, logp = forward(encoded.input_ids)
    answer = np.array(encoded.answer)
    raw = np.stack([q[0, :, 0].numpy() for q in out.quality_score]).astype(float)
    logits = np.stack([m.numpy() for m in out.moe_logits]).astype(float)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    good = 1 / (1 + np.exp(-raw))
    at = np.flatnonzero(answer)
    alone = encode_answer_only(row.messages, tokenizer, max_length)
    at_alone = np.flatnonzero(alone.answer)[: len(at)]
    logp_alone = forward(alone.input_ids)[1]
    return {
        "quality_score": raw.mean(1),
        "good_ratio": good.mean(1),
        "quality_score_answer": raw[:, answer].mean(1) if len(at) else np.full(LAYERS, np.nan),
        "good_ratio_answer": good[:, answer].mean(1) if len(at) else np.full(LAYERS, np.nan),
        "router_probs": probs.mean(1),
        "nll": -np.mean([logp[t - 1, encoded.input_ids[t]] for t in at]) if len(at) else np.nan,
        "nll_unconditional": -np.mean([logp_alone[t - 1, alone.input_ids[t]] for t in at_alone]) if len(at) else np.nan,
        "tokens": len(encoded),
        "answer_tokens": len(at),
        "truncated": encoded.truncated,
        "answer_bytes": sum(len(a.encode()) for a in row.answers),
    }


def test_spec7_20_21_24_results_are_the_definitions_on_the_trained_text(world: Path, whole: Path) -> None:
    data = read_router_data(whole)
    rows = read_pool(world / "pool")
    assert data.keys == [row.key for row in rows]
    assert data.router_probs.shape == (len(rows), LAYERS, EXPERTS)
    for i in (0, 7, len(rows) // 2, data.id.index("long question")):
        for name, value in reference(world, rows[i]).items():
            assert np.allclose(getattr(data, name)[i], value, rtol=2e-4, atol=2e-5, equal_nan=True), (rows[i].key, name)


def test_a_row_whose_answer_was_cut_off_has_no_answer_score(whole: Path) -> None:
    data = read_router_data(whole)
    i = data.id.index("long question")
    assert data.truncated[i]
    assert data.answer_tokens[i] == 0
    assert np.isnan(data.nll[i])
    assert np.isnan(data.good_ratio_answer[i]).all()
    assert np.isfinite(data.good_ratio[i]).all()


def test_spec7_18_router_weights_are_taken_from_the_file_and_from_its_folder(
    world: Path, whole: Path, tmp_path: Path
) -> None:
    settings = {"nll": True, "ifd": True}
    file = routed(
        world, tmp_path / "a", model_checkpoint_path=str(world / "warmup" / "full_rank_weights.pt"), **settings
    )
    assert read_manifest(file).identity == read_manifest(whole).identity
    own = read_router_data(routed(world, tmp_path / "b", **settings))
    assert not np.allclose(own.quality_score, read_router_data(whole).quality_score, atol=1e-3)
    with pytest.raises(UserError, match=r"model_checkpoint_path=.*does not exist"):
        routed(world, tmp_path / "c", model_checkpoint_path=str(world / "nowhere"))
    assert not (tmp_path / "c").exists()


def test_spec7_19_scores_are_distinct_float32(whole: Path) -> None:
    data = read_router_data(whole)
    assert len(np.unique(data.quality_score[:, 0])) == len(data)
    assert np.allclose(data.router_probs.sum(-1), 1, atol=1e-6)


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 3}, {"token_budget": 4096}])
def test_spec7_25_batches_change_results_by_rounding_only(
    world: Path, whole: Path, tmp_path: Path, settings: dict[str, int]
) -> None:
    a = read_router_data(whole)
    weights = {"model_checkpoint_path": str(world / "warmup"), "nll": True, "ifd": True}
    b = read_router_data(routed(world, tmp_path / "out", **weights, **settings))
    for name in ("quality_score", "good_ratio_answer", "router_probs", "nll", "nll_unconditional"):
        assert np.allclose(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-5, equal_nan=True), name


def test_any_number_of_shards_in_any_order_gives_the_same_bytes_and_identity(
    world: Path, whole: Path, tmp_path: Path
) -> None:
    settings = {"nll": True, "ifd": True, "model_checkpoint_path": str(world / "warmup")}
    rng = random.Random(3)
    for count in (1, 2, 3, 7, 16):
        order = rng.sample(range(count), count)
        work = str(tmp_path / "work")  # one work root for all, as in the pipeline
        shards = [
            routed(world, tmp_path / f"{count}-{i}", shard__index=i, shard__count=count, work_root=work, **settings)
            for i in order
        ]
        output = merged(shards, tmp_path / f"merged-{count}")
        assert contents(output) == contents(whole)
        ours, theirs = read_manifest(output), read_manifest(whole)
        assert (ours.stage, ours.identity, ours.key) == ("route", theirs.identity, theirs.key)
        stages = {read_manifest(shard).stage for shard in shards}
        assert stages == ({"route"} if count == 1 else {f"route-shard-{i}-of-{count}" for i in range(count)})
        assert merged(shards, output) == output  # found, not done again


def test_more_shards_than_batches(world: Path, tmp_path: Path) -> None:
    settings = {"token_budget": 8192}
    shards = [routed(world, tmp_path / str(i), shard__index=i, shard__count=40, **settings) for i in (0, 1, 39)]
    assert sum(read_manifest(s).rows["out"] for s in shards[:2]) > 0
    assert read_manifest(shards[2]).rows == {"in": 0, "out": 0, "dropped": {}}


def test_execution_fields_leave_identity_and_bytes_alone(world: Path, tmp_path: Path) -> None:
    a = routed(world, tmp_path / "a")
    moved = tmp_path / "elsewhere"
    shutil.copytree(world, moved)
    b = routed(moved, tmp_path / "b", work_root=str(tmp_path / "work"))
    assert contents(a) == contents(b)
    assert read_manifest(a).identity == read_manifest(b).identity
    assert len(find_manifests(tmp_path / "a")) == 1
    assert not (tmp_path / "a" / ".work").exists()


def test_the_number_of_threads_changes_results_by_rounding_at_most(world: Path, tmp_path: Path) -> None:
    root = tmp_path / "world"
    shutil.copytree(world, root)
    shutil.rmtree(root / "pool")
    make_pool(root / "pool", make_rows(8))
    one, two = (read_router_data(routed(root, tmp_path / str(n), threads=n)) for n in (1, 2))
    torch.set_num_threads(1)
    for name in ("quality_score", "good_ratio_answer", "router_probs"):
        assert np.allclose(getattr(one, name), getattr(two, name), rtol=1e-5, atol=1e-6, equal_nan=True), name


def test_spec7_23_a_killed_run_goes_on_from_what_was_committed(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    clean = routed(world, tmp_path / "clean")
    batches = json.loads((clean / "plan.json").read_text())["batches"]
    monkeypatch.setattr(routing, "COMMIT_SECONDS", 0.0)
    real, calls = judging.Judge.read, 0

    def read(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise Killed
        return real(self, *arguments)

    monkeypatch.setattr(judging.Judge, "read", read)
    kills = 0
    while True:
        try:
            output = routed(world, tmp_path / "killed")
            break
        except Killed:
            kills += 1
    assert kills >= 2
    assert calls - kills == batches
    assert contents(output) == contents(clean)
    assert read_manifest(output).identity == read_manifest(clean).identity


def test_a_batch_too_large_for_memory_is_found_first_and_a_budget_that_fits_is_named(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = judging.Judge.read, []

    def read(self: Any, batch: judging.Batch) -> Any:
        sizes.append(batch.ids.numel())
        if batch.ids.numel() > 140:
            raise torch.OutOfMemoryError("no memory")
        return real(self, batch)

    monkeypatch.setattr(judging.Judge, "read", read)
    with pytest.raises(UserError, match=r"largest batch .* does not fit into memory; token_budget=(\d+) fits") as error:
        routed(world, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert sizes[0] == max(sizes) > 140
    budget = int(str(error.value).split("token_budget=")[1].split()[0])
    routed(world, tmp_path / "out", token_budget=budget)


def test_spec7_28_rows_in_are_rows_out_plus_dropped(world: Path, tmp_path: Path) -> None:
    root = tmp_path / "world"
    shutil.copytree(world, root)
    shutil.rmtree(root / "pool")
    nothing = [Row(name, "nothing", []) for name in ("d0", "d2", "empty")]
    make_pool(root / "pool", [*make_rows(12), *nothing])
    whole = routed(root, tmp_path / "whole")
    assert read_manifest(whole).rows == {"in": 16, "out": 13, "dropped": {"no_valid_token": 3}}
    for count in (2, 3, 7):  # whatever shard has a dataset's first rows
        shards = [routed(root, tmp_path / f"{count}-{i}", shard__index=i, shard__count=count) for i in range(count)]
        output = merged(shards, tmp_path / f"merged-{count}")
        for part in (".", "router_data/d0", "router_data/d2"):
            ours, theirs = read_manifest(output / part), read_manifest(whole / part)
            assert (ours.rows, ours.identity) == (theirs.rows, theirs.identity)
        assert contents(output) == contents(whole)
    data: RouterData = read_router_data(output)
    assert len(data) == 13
    assert "nothing" not in data.id


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 0}, "max_length=0"),
        ({"token_budget": 100}, "token_budget=100 holds no row of max_length=128"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"ifd": True}, "ifd=true needs nll=true"),
        ({"shard__index": 2, "shard__count": 2}, "shard.index=2 must be from 0 to shard.count - 1 = 1"),
        ({"shard__count": 0}, "shard.index=0 must be"),
    ],
)
def test_settings_out_of_range_are_said_at_once(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(tmp_path, tmp_path / "out", **settings)


def test_another_run_s_output_is_refused(world: Path, tmp_path: Path) -> None:
    shard = routed(world, tmp_path / "out", shard__index=0, shard__count=2)
    before = sha256_file(shard / "manifest.json")
    for other in ({"shard__index": 1, "shard__count": 2}, {}, {"max_length": 64}):
        with pytest.raises(UserError, match="holds another run's output"):
            routed(world, tmp_path / "out", **other)
    assert sha256_file(shard / "manifest.json") == before
    assert routed(world, tmp_path / "out", shard__index=0, shard__count=2) == shard


def half(hidden: torch.Tensor, training: bool) -> torch.Tensor:
    return hidden / 2


def test_a_custom_trash_expert_is_named_and_allowed_on_the_command_line_and_part_of_the_identity(
    world: Path, tmp_path: Path
) -> None:
    judge = tmp_path / "applied"
    shutil.copytree(world / "judge", judge, ignore=shutil.ignore_patterns("manifest.json"))
    config = json.loads((judge / "config.json").read_text())
    changed = {"gate_mode": "applied", "trash_expert_mode": "custom"}
    (judge / "config.json").write_text(json.dumps(config | changed))
    own = f"{__name__}:half"

    def given(output: str, **settings: Any) -> RouteConfig:
        config = config_of(world, tmp_path / output, **settings)
        config.selector_model.path = str(judge)
        return config

    with pytest.raises(UserError, match=r"custom trash expert: name it with selector_model\.trash_expert="):
        route.run(given("a"))
    with pytest.raises(UserError, match=r"allow_code=\[\] must be what is named and no more"):
        given("b", selector_model__trash_expert=own)
    out = route.run(given("c", selector_model__trash_expert=own, allow_code=[own]))
    assert read_manifest(out).inputs["trash_expert"]["uri"] == own
    assert "trash_expert" not in json.dumps(read_manifest(out).config["identity"])


class Killed(BaseException):
    """What no code of ours catches."""


def test_shards_in_random_order_killed_at_random_and_started_again_give_the_same_bytes(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = routed(world, tmp_path / "clean")
    rng = random.Random(5)
    monkeypatch.setattr(routing, "COMMIT_SECONDS", 0.0)
    real, kills = judging.Judge.read, 0

    def read(self: Any, batch: judging.Batch) -> Any:
        nonlocal kills
        if rng.random() < 0.15:
            kills += 1
            raise Killed
        return real(self, batch)

    monkeypatch.setattr(judging.Judge, "read", read)
    waiting = [(count, index) for count in (2, 3, 7, 16) for index in range(count)]
    rng.shuffle(waiting)
    while waiting:
        count, index = waiting.pop(0)
        try:
            routed(world, tmp_path / f"{count}-{index}", shard__index=index, shard__count=count)
        except Killed:
            waiting.insert(rng.randint(0, len(waiting)), (count, index))
    assert kills > 3
    for count in (2, 3, 7, 16):
        shards = [tmp_path / f"{count}-{index}" for index in range(count)]
        assert contents(merged(shards, tmp_path / f"merged-{count}")) == contents(clean)


def test_a_restart_by_other_processes_goes_on_from_what_was_committed(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = routed(world, tmp_path / "clean")
    monkeypatch.setattr(routing, "COMMIT_SECONDS", 0.0)
    real, calls = judging.Judge.read, 0

    def read(self: Any, batch: judging.Batch) -> Any:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise Killed
        return real(self, batch)

    monkeypatch.setattr(judging.Judge, "read", read)
    everything = routing.route_units

    def as_second_of_three(judge: Any, work: Any, mine: Any, results: Any, out: Any) -> None:
        everything(judge, work, mine[1::3], results, out)  # the share of another process, killed

    monkeypatch.setattr(route, "route_units", as_second_of_three)
    with pytest.raises(Killed):
        routed(world, tmp_path / "out")
    assert calls == 6
    monkeypatch.setattr(route, "route_units", everything)
    output = routed(world, tmp_path / "out")
    assert calls == json.loads((clean / "plan.json").read_text())["batches"] + 1
    assert contents(output) == contents(clean)


def test_a_new_dataset_leaves_the_others_identities_alone_and_costs_its_own_rows_only(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "grown"
    shutil.copytree(world, root)
    shutil.rmtree(root / "pool")
    new = [Row("e", f"n{i}", row.messages) for i, row in enumerate(make_rows(6))]
    make_pool(root / "pool", [*make_rows(), *new])
    before = routed(world, tmp_path / "before")
    fresh = routed(root, tmp_path / "fresh")
    real, computed = judging.Judge.read, 0

    def read(self: Any, batch: judging.Batch) -> Any:
        nonlocal computed
        computed += len(batch.ids)
        return real(self, batch)

    monkeypatch.setattr(judging.Judge, "read", read)
    grown = routed(root, tmp_path / "after", reuse=[str(before)])
    assert computed == len(new)
    assert contents(grown) == contents(fresh)
    assert read_manifest(grown).identity == read_manifest(fresh).identity
    for name in ("d0", "d1", "d2"):
        one, two = (read_manifest(out / "router_data" / name) for out in (before, grown))
        assert (one.identity, one.files) == (two.identity, two.files)
    alone = config_of(root, tmp_path / "alone")
    alone.data = str(root / "pool" / "e")
    by_itself = route.run(alone)
    assert (
        read_manifest(by_itself / "router_data" / "e").identity == read_manifest(grown / "router_data" / "e").identity
    )
    together = read_router_data([before, by_itself])
    assert together.keys == read_router_data(fresh).keys
    assert np.array_equal(together.router_probs, read_router_data(fresh).router_probs)
    other = routed(root, tmp_path / "other", reuse=[str(before)], max_length=64)  # nothing fits: all is computed
    assert computed == len(new) * 3 + len(make_rows())  # with those of "alone"
    assert len(read_router_data(other)) == len(together)


def test_what_cannot_be_reused_is_said(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"reuse= goes with shard\.count=1"):
        config_of(world, tmp_path / "out", reuse=["x"], shard__count=2)
    with pytest.raises(UserError, match=r"reuse=.*judge is an output of stage 'convert', not of route"):
        routed(world, tmp_path / "out", reuse=[str(world / "judge")])
    with pytest.raises(UserError, match=r"nowhere has no manifest"):
        routed(world, tmp_path / "out", reuse=[str(world / "nowhere")])


def other_judge(world: Path, folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    load_tokenizer(world / "judge").save_pretrained(folder)
    return folder


def sizes_of(world: Path) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    vocabulary = len(load_tokenizer(world / "judge"))
    return {**sizes, "num_key_value_heads": 2, "vocab_size": vocabulary, "initializer_range": 0.3, "pad_token_id": 0}


def test_a_plain_mixture_of_experts_has_routing_and_likelihood_but_no_scores(world: Path, tmp_path: Path) -> None:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    config = OlmoeConfig(**sizes_of(world), num_experts=EXPERTS, num_experts_per_tok=2)
    judge = other_judge(world, tmp_path / "olmoe", OlmoeForCausalLM(config))
    settings = config_of(world, tmp_path / "out", nll=True)
    settings.selector_model.path = str(judge)
    data = read_router_data(route.run(settings))
    assert data.router_probs.shape == (len(data), LAYERS, EXPERTS)
    assert np.allclose(data.router_probs.sum(-1), 1, atol=1e-6)
    assert np.isfinite(data.nll).sum() == len(data) - 1  # one answer was cut off
    assert data.quality_score.shape == data.good_ratio_answer.shape == data.embedding.shape == (len(data), 0)
    settings.model_checkpoint_path, settings.output_dir = str(world / "warmup"), str(tmp_path / "other")
    with pytest.raises(UserError, match=r"model_checkpoint_path= goes with a Select-MoE checkpoint"):
        route.run(settings)


def test_a_dense_model_gives_embeddings_and_likelihood(world: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes_of(world))).eval()
    settings = config_of(world, tmp_path / "out", nll=True)
    settings.selector_model.path = str(other_judge(world, tmp_path / "llama", model))
    data = read_router_data(route.run(settings))
    assert data.router_probs.size == 0
    assert data.embedding.shape == (len(data), 32)
    for i in (0, 5, len(data) - 1):
        row = read_pool(world / "pool")[i]
        ids = encode(row.messages, load_tokenizer(world / "judge"), 128).input_ids
        with torch.no_grad():
            hidden = model.model(torch.tensor([ids])).last_hidden_state[0].double().numpy()
        assert np.allclose(data.embedding[i], np.average(hidden, axis=0, weights=np.arange(1, len(ids) + 1)), atol=1e-5)
    assert np.isfinite(data.nll).sum() == len(data) - 1


def test_a_tokenizer_or_a_length_that_does_not_fit_the_model_is_refused(world: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {**sizes_of(world), "vocab_size": 99, "max_position_embeddings": 64}
    settings = config_of(world, tmp_path / "out")
    settings.selector_model.path = str(other_judge(world, tmp_path / "small", LlamaForCausalLM(LlamaConfig(**small))))
    with pytest.raises(UserError, match=r"the tokenizer has the token id \d+, the model 99 embeddings"):
        route.run(settings)
    short = {**sizes_of(world), "max_position_embeddings": 64}
    settings.selector_model.path = str(other_judge(world, tmp_path / "short", LlamaForCausalLM(LlamaConfig(**short))))
    with pytest.raises(UserError, match=r"max_length=128 is more than the 64 positions"):
        route.run(settings)
    assert not (tmp_path / "out").exists()


def test_a_pool_that_is_changed_while_it_is_routed_is_an_error_that_names_the_file(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "world"
    shutil.copytree(world, root)
    real = judging.Judge.read

    def read(self: Any, batch: judging.Batch) -> Any:
        file = root / "pool" / "d1" / "00000.parquet"
        file.write_bytes(file.read_bytes() + b"?")
        return real(self, batch)

    monkeypatch.setattr(judging.Judge, "read", read)
    with pytest.raises(
        UserError, match=r"pool/d1.* 00000\.parquet does not have the bytes|d1/00000.parquet is not a pool's"
    ):
        routed(root, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(UserError, match=r"d1/00000\.parquet does not have the bytes"):
        routed(root, tmp_path / "out")


def test_a_reset_of_s3_in_the_middle_is_retried_and_work_there_is_found_again(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: Proxy
) -> None:
    clean = routed(world, tmp_path / "clean")
    monkeypatch.setattr(routing, "COMMIT_SECONDS", 0.0)
    s3.faults = [
        Fault("reset-request", "PUT", "work", times=2, after=100),
        Fault("reset-response", "GET", "work", times=1),
    ]
    output = routed(world, tmp_path / "out", work_root="s3://bucket/work")
    assert contents(output) == contents(clean)
    s3.faults = [Fault("status", "PUT", "safetensors", times=10_000)]
    with pytest.raises(Unavailable, match="bucket"):
        routed(world, tmp_path / "down", work_root="s3://bucket/work2")
    assert not (tmp_path / "down" / "manifest.json").exists()
    s3.faults = []
    assert contents(routed(world, tmp_path / "down", work_root="s3://bucket/work2")) == contents(clean)


@pytest.mark.parametrize("where", ["tokens", "commit", "router data"])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    clean = routed(world, tmp_path / "clean")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    small = {"tokens": 1000, "commit": 200, "router data": 300}[where]
    owner, name = {
        "tokens": (token_store, "write"),
        "commit": (routing.Results, "flush"),
        "router data": (route, "assemble"),
    }[where]
    real = getattr(owner, name)

    def full(*arguments: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (small, limits[1]))
        try:
            return real(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(owner, name, full)
    with pytest.raises((Unavailable, OSError), match=r"cannot be written|File too large"):
        routed(world, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    monkeypatch.setattr(owner, name, real)
    assert contents(routed(world, tmp_path / "out")) == contents(clean)


def test_the_predecessors_files_are_written_beside_and_are_the_same_from_shards(
    world: Path, whole: Path, tmp_path: Path
) -> None:
    settings = {"nll": True, "ifd": True, "model_checkpoint_path": str(world / "warmup"), "export_legacy": True}
    output = routed(world, tmp_path / "out", **settings)
    parts = [routed(world, tmp_path / str(i), shard__index=i, shard__count=3, **settings) for i in range(3)]
    assert not list(parts[0].glob(EXPORTED))
    together = merged(parts, tmp_path / "merged")
    again = routed(world, tmp_path / "again", reuse=[str(whole)], **settings)  # nothing is routed for an export
    files = {path.name: sha256_file(path) for path in output.glob(EXPORTED)}
    assert sorted(files) == [f"d{i}_router_data.pt" for i in range(3)]
    for other in (together, again):
        assert {path.name: sha256_file(path) for path in other.glob(EXPORTED)} == files
        assert read_manifest(other).identity == read_manifest(output).identity
    assert contents(output) == contents(whole)
    assert not [path for path in again.rglob("*") if path.is_dir() and path.name.startswith("tmp")]
    data = read_router_data(output)
    back = read_router_data([output / "router_data" / name for name in files])
    assert back.keys == data.keys
    assert np.array_equal(score(back, "legacy"), score(data, "legacy"))
