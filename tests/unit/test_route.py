"""Routing with a tiny judge made on the fly: `pytest tests/unit/test_route.py`."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from selectmoe import judge as judging
from selectmoe import merge, route
from selectmoe.config import load
from selectmoe.errors import UserError
from selectmoe.manifest import find_manifests, read_manifest, sha256_file, write_manifest
from selectmoe.merge import MergeConfig
from selectmoe.pool import Row, read_pool, write_pool
from selectmoe.route import RouteConfig
from selectmoe.router_data import RouterData, read_router_data
from selectmoe.template import encode, encode_answer_only, load_tokenizer

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
    (root / "pool").mkdir()
    write_pool(root / "pool", make_rows())
    finish(root / "pool", "ingest")
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
    for count in (1, 2, 3, 7):
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
    write_pool(root / "pool", make_rows(8))
    finish(root / "pool", "ingest")
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
    monkeypatch.setattr(route, "COMMIT_SECONDS", 0.0)
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

    def read(self: Any, encoded: Any, length: int) -> Any:
        sizes.append(len(encoded) * length)
        if len(encoded) * length > 300:
            raise torch.OutOfMemoryError("no memory")
        return real(self, encoded, length)

    monkeypatch.setattr(judging.Judge, "read", read)
    with pytest.raises(UserError, match=r"largest batch .* does not fit into memory; token_budget=(\d+) fits") as error:
        routed(world, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert sizes[0] == max(sizes) > 300
    budget = int(str(error.value).split("token_budget=")[1].split()[0])
    routed(world, tmp_path / "out", token_budget=budget)


def test_spec7_28_rows_in_are_rows_out_plus_dropped(world: Path, tmp_path: Path) -> None:
    root = tmp_path / "world"
    shutil.copytree(world, root)
    shutil.rmtree(root / "pool")
    write_pool(root / "pool", [*make_rows(12), Row("d0", "nothing", [])])
    finish(root / "pool", "ingest")
    shards = [routed(root, tmp_path / str(i), shard__index=i, shard__count=2) for i in (0, 1)]
    output = merged(shards, tmp_path / "merged")
    assert read_manifest(output).rows == {"in": 14, "out": 13, "dropped": {"no_valid_token": 1}}
    assert contents(output) == contents(routed(root, tmp_path / "whole"))
    assert read_manifest(output).identity == read_manifest(tmp_path / "whole").identity
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
