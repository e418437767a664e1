"""What every transformers model promises, tried on ours: `make model-test`, or pytest tests/models/test_promises.py"""

from __future__ import annotations

import functools
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

from selectmoe.modeling import QualityGate, SelectMoeConfig, SelectMoeForCausalLM, SelectMoeModel, realign
from tests.models.fetch import pinned

MODES = ["observer", "applied"]
WORDS = [f"w{i}" for i in range(93)]
PARTS = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")


def judge(mode: str = "applied", **options: Any) -> SelectMoeForCausalLM:
    torch.manual_seed(0)
    config = SelectMoeConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=1,
        initializer_range=0.3,
        gate_mode=mode,
        quality_gate_init_std=0.3,
        **{"trash_expert_mode": "noise"} | options,
    )
    model: SelectMoeForCausalLM = SelectMoeForCausalLM(config).eval()
    return model


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(5))


def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", "<pad>", "<eos>", *WORDS])}, "<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("saved")
    judge().save_pretrained(folder, max_shard_size="20KB")
    tokenizer().save_pretrained(folder)
    return folder


def test_the_sdist_is_the_version_that_is_installed() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f"transformers=={pinned()[0]}" in tomllib.loads(text)["project"]["optional-dependencies"]["train"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_shards_hold_every_tensor_to_the_bit_in_olmoes_own_layout(
    mode: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = judge(mode).to(dtype)
    for module in model.modules():
        if isinstance(module, QualityGate):
            module.float()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    names = set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"])
    assert {"model.layers.1.mlp.experts.3.down_proj.weight", "model.layers.1.quality_gate.bias"} < names
    for shard in tmp_path.glob("*.safetensors"):
        with safe_open(str(shard), "pt") as file:
            kinds = {name: file.get_tensor(name).dtype for name in list(file.keys())}
        assert all(kind == (torch.float32 if "quality_gate" in name else dtype) for name, kind in kinds.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert type(again) is SelectMoeForCausalLM
    assert again.config.to_json_string() == model.config.to_json_string()
    here, there = dict(model.named_parameters()), dict(again.named_parameters())
    assert set(here) == set(there)
    assert all(torch.equal(here[name], there[name]) and here[name].dtype == there[name].dtype for name in here)
    base, report = AutoModel.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert type(base) is SelectMoeModel
    assert not report["missing_keys"]
    realign(again)
    realign(base)
    assert torch.equal(again.model(tokens()).last_hidden_state, base(tokens()).last_hidden_state)


@pytest.mark.parametrize("mode", MODES)
def test_generation_is_the_same_with_every_cache_without_one_and_for_padded_rows(mode: str) -> None:
    model = judge(mode)
    one, two = tokens(1, 9), tokens(2, 5)[1:]
    greedy: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    want = [model.generate(ids, **greedy, use_cache=False)[0, -8:] for ids in (one, two)]
    for options in ({}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(one, **greedy, **options, disable_compile=True)[0, -8:], want[0])
    padded = torch.cat([torch.ones(1, 4, dtype=torch.long), two], 1)
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    both = model.generate(torch.cat([one, padded]), attention_mask=mask, **greedy)
    assert torch.equal(both[0, -8:], want[0])
    assert torch.equal(both[1, -8:], want[1])
    beams = model.generate(one, **greedy, num_beams=3, num_return_sequences=2, output_scores=True)
    assert beams.shape == (2, 17)
    torch.manual_seed(1)
    drawn = model.generate(one, max_new_tokens=8, min_new_tokens=8, do_sample=True, return_dict_in_generate=True)
    torch.manual_seed(1)
    assert torch.equal(drawn.sequences, model.generate(one, max_new_tokens=8, min_new_tokens=8, do_sample=True))


@pytest.mark.parametrize("mode", MODES)
def test_experts_back_ends_agree_in_outputs_and_gradients(mode: str) -> None:
    found = {}
    for backend in ("eager", "batched_mm", "grouped_mm"):
        model = judge(mode)
        model.set_experts_implementation(backend)
        out = model(tokens(), labels=tokens(), output_router_logits=True)
        out.loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        found[backend] = (out.logits, *out.moe_logits, *out.quality_score, gradients)
    for other in ("batched_mm", "grouped_mm"):
        torch.testing.assert_close(found[other], found["eager"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_of_any_kind_and_function_gives_every_parameter_the_same_gradient(mode: str) -> None:
    calls = []

    def own(function: Any, *args: Any, **options: Any) -> Any:  # as transformers' own for offloading, which needs a GPU
        calls.append(options)
        return checkpoint(function, *args, **options)

    found = []
    for options in (None, {}, {"every_n_layers": 2}, {"activation_checkpointing_kwargs": {"use_reentrant": True}}, own):
        model = judge(mode, trash_expert_mode="zero").train()
        if options is own:
            model._set_gradient_checkpointing(True, functools.partial(own, use_reentrant=True))
        elif options is not None:
            model.activation_checkpointing_enable(**options)
        model(tokens(), labels=tokens(), output_router_logits=True).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert calls == [{"use_reentrant": False}] * 2
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "place", ["auto", {"": "cpu"}, PARTS | {"model.layers.1": "disk"}], ids=["auto", "cpu", "disk"]
)
def test_a_device_map_changes_nothing_offloaded_layers_included(place: Any, saved: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved, device_map=place, offload_folder=tmp_path).eval()
    want, got = judge()(tokens(), output_router_logits=True), model(tokens(), output_router_logits=True)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.quality_score, want.quality_score, rtol=1e-5, atol=1e-5)
    assert len(got.moe_logits) == 2


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_runs_forward_backward_and_generates_with_float32_gates(mode: str, saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16, gate_mode=mode)
    assert {p.dtype for n, p in model.named_parameters() if "quality_gate" in n} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if "quality_gate" not in n} == {torch.bfloat16}
    out = model(tokens(), labels=tokens(), output_router_logits=True)
    assert out.logits.dtype == torch.bfloat16
    assert {score.dtype for score in (*out.quality_score, *out.moe_logits)} == {torch.float32}
    out.loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in model.parameters())
    assert model.generate(tokens(), max_new_tokens=3, min_new_tokens=3).shape == (2, 12)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = judge(mode)(tokens(), output_router_logits=True)
    assert {score.dtype for score in mixed.quality_score} == {torch.float32}


@pytest.mark.parametrize("mode", MODES)
def test_peft_trains_saves_and_merges_adapters_on_attention_experts_and_routers(mode: str, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.gate.weight", "mlp.experts.down_proj"],
        modules_to_save=["quality_gate"],
        init_lora_weights=False,
    )
    model = get_peft_model(judge(mode), config)
    assert all(p.requires_grad == ("lora_" in n or "modules_to_save" in n) for n, p in model.named_parameters())
    out = model(input_ids=tokens(), labels=tokens(), output_router_logits=True)
    assert len(out.quality_score) == len(out.moe_logits) == 2
    assert not torch.equal(out.moe_logits[0], judge(mode)(tokens(), output_router_logits=True).moe_logits[0])
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        model.base_model.model.model.layers[0].quality_gate.modules_to_save["default"].weight.add_(1.0)
    want = model.eval()(input_ids=tokens(), output_router_logits=True)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(judge(mode), tmp_path).eval()
    for again in (loaded, loaded.merge_and_unload()):
        got = again(input_ids=tokens(), output_router_logits=True)
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(got.quality_score, want.quality_score, rtol=1e-3, atol=1e-3)


def test_an_adapter_around_a_gate_is_seen_in_the_recorded_score() -> None:
    from peft import LoraConfig, get_peft_model

    before = judge("observer")(tokens(), output_router_logits=True).quality_score[0]
    config = LoraConfig(r=2, target_modules=["quality_gate"], init_lora_weights=False)
    adapted = get_peft_model(judge("observer"), config).eval()
    seen = adapted(input_ids=tokens(), output_router_logits=True).quality_score[0]
    assert not torch.equal(seen, before)
    merged = adapted.merge_and_unload()(tokens(), output_router_logits=True).quality_score[0]
    torch.testing.assert_close(seen, merged, rtol=1e-4, atol=1e-4)


def test_transformers_pipeline_writes_text_from_the_folder(saved: Path) -> None:
    generator = pipeline("text-generation", model=str(saved))
    assert type(generator.model) is SelectMoeForCausalLM
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    prompts = ["w3 w4 w5 w6", "w7"]
    alone = [generator(prompt, **options)[0]["generated_text"] for prompt in prompts]
    together = [answers[0]["generated_text"] for answers in generator(prompts, batch_size=2, **options)]
    assert together == alone
    assert all(text.startswith(prompt) and text != prompt for text, prompt in zip(alone, prompts, strict=True))


def test_lm_eval_scores_with_our_model(saved: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, text = AutoModelForCausalLM.from_pretrained(saved).eval(), tokenizer()
    pairs = [("w3 w4 w5", " w6 w7"), ("w9", " w3"), ("w1 w2 w3 w4", " w5")]
    wrapped = HFLM(pretrained=model, tokenizer=text, batch_size=3, max_length=64)
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    for pair, (likelihood, _) in zip(pairs, wrapped.loglikelihood(requests, disable_tqdm=True), strict=True):
        ids = text("".join(pair), return_tensors="pt")["input_ids"]
        asked = len(text(pair[0])["input_ids"])
        with torch.inference_mode():
            logs = model(ids).logits.log_softmax(-1)[0, asked - 1 : -1]
        assert likelihood == pytest.approx(float(logs.gather(1, ids[0, asked:, None]).sum()), abs=1e-3)


def test_fsdp_wraps_the_layers_that_the_model_names_and_trains_the_same(tmp_path: Path) -> None:
    import torch.distributed as dist
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import FSDPModule, fully_shard

    def gradients(model: SelectMoeForCausalLM) -> dict[str, torch.Tensor]:
        model(tokens(), labels=tokens(), output_router_logits=True).loss.backward()
        found = ((name, p.grad) for name, p in model.named_parameters())
        return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found}

    want, model = gradients(judge()), judge()
    plugin = FullyShardedDataParallelPlugin(auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(model)
    layers = set(model.model.layers)
    wrapped = {m for m in model.modules() if plugin.auto_wrap_policy(m, recurse=False, nonwrapped_numel=0)}
    assert wrapped == layers
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    try:
        for layer in wrapped:
            fully_shard(layer)
        fully_shard(model)
        assert all(isinstance(layer, FSDPModule) for layer in layers)
        got = gradients(model)
    finally:
        dist.destroy_process_group()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6)
