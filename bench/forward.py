"""What quality gates cost a forward pass: ours against OLMoE's of the same size and weights. `make bench-forward`.

    python -m bench.forward [rounds=12] [rows=24] [model=18M|117M]

Rows of realistic lengths, sorted and padded in batches of 8, go through OLMoE and through Select-MoE in both gate modes,
in turn, round after round, with the same attention and experts back end, with router outputs and without. Reported is the
median over the rounds of CPU time (one thread), as a ratio to OLMoE's pass of the same round, with its quartiles. The aim: at
most 1.03. The arithmetic itself asks for next to nothing: 2 H operations per token and layer for a gate, 3 H more where it is
applied; the ratio that this gives is printed beside. CPU times, because they hold on a busy machine, too; "itself" is a
second OLMoE in the same rounds: what this machine can tell apart.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from typing import Any

from bench.workloads import REF_18M, REF_117M, lengths

BATCH = 8
AIM = 1.03
MODELS = {"18M": REF_18M, "117M": REF_117M}


def models(sizes: dict[str, Any]) -> dict[str, Any]:
    """OLMoE twice, and ours with its weights."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    from selectmoe.modeling import SelectMoeConfig, SelectMoeForCausalLM, realign

    torch.manual_seed(0)
    original = OlmoeForCausalLM(OlmoeConfig(**sizes)).eval()
    found: dict[str, Any] = {"OLMoE": original, "itself": OlmoeForCausalLM(OlmoeConfig(**sizes)).eval()}
    for name, options in {
        "observer": {},
        "applied": {"gate_mode": "applied"},
        "applied, noise": {"gate_mode": "applied", "trash_expert_mode": "noise"},
    }.items():
        found[name] = SelectMoeForCausalLM(SelectMoeConfig(**sizes, **options)).eval()
    for model in found.values():
        model.load_state_dict(original.state_dict(), strict=False)
        realign(model)  # the same alignment for all
    backends = {(m.config._attn_implementation, m.config._experts_implementation) for m in found.values()}
    if len(backends) != 1:
        raise SystemExit(f"the models run with different back ends: {sorted(backends)}")
    print("attention and experts back end:", ", ".join(backends.pop()))
    return found


def batches(rows: int, vocabulary: int) -> list[tuple[Any, Any]]:
    """Token ids and masks [B, T], shortest rows first."""
    import torch

    found, wanted = [], sorted(lengths(rows))
    for start in range(0, rows, BATCH):
        part = torch.tensor(wanted[start : start + BATCH])
        mask = (torch.arange(int(part.max()))[None] < part[:, None]).long()
        ids = torch.randint(3, vocabulary, mask.shape, generator=torch.Generator().manual_seed(start))
        found.append((ids.masked_fill(mask == 0, 1), mask))
    return found


def measure(found: dict[str, Any], work: list[tuple[Any, Any]], rounds: int, record: bool) -> dict[str, list[float]]:
    """CPU seconds of every round; the order turns from round to round."""
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in found}
    names = list(found)
    with torch.inference_mode():
        for at in range(-1, rounds):  # one round to warm up
            for name in names[at % len(names) :] + names[: at % len(names)]:
                started = time.process_time()
                for ids, mask in work:
                    found[name](input_ids=ids, attention_mask=mask, output_router_logits=record, use_cache=False)
                if at >= 0:
                    seconds[name].append(time.process_time() - started)
    return seconds


def arithmetic(sizes: dict[str, Any], applied: bool) -> float:
    """Operations per token of ours over OLMoE's, attention over the past left out (it makes the ratio smaller)."""
    h, i = sizes["hidden_size"], sizes["intermediate_size"]
    layer = 2 * (4 * h * h + h * sizes["num_experts"] + sizes["num_experts_per_tok"] * 3 * h * i)
    total = sizes["num_hidden_layers"] * layer + 2 * h * sizes["vocab_size"]
    return 1.0 + int(sizes["num_hidden_layers"]) * int(h) * (5 if applied else 2) / float(total)


def main(rounds: int = 12, rows: int = 24, model: str = "18M") -> int:
    """Measure and print; 1 where a model is over the aim.

    Its median is compared, where this run could tell a model of the aim's cost from OLMoE itself (both quartiles of
    `itself` are nearer to 1 than the aim); else its lower quartile.
    """
    import torch

    torch.set_num_threads(1)
    sizes = MODELS[model]
    found, work = models(sizes), batches(rows, sizes["vocab_size"])
    print(f"ref-{model}, {rows} rows, {sum(int(mask.sum()) for _, mask in work)} tokens, {rounds} rounds, one thread")
    print(f"{'model':<16}{'router outputs':<16}{'ratio':>7}{'quartiles':>16}{'arithmetic':>12}")
    worst = 0.0
    over = False
    for record in (False, True):
        seconds = measure(found, work, rounds, record)
        ratios = {name: [a / b for a, b in zip(own, seconds["OLMoE"], strict=True)] for name, own in seconds.items()}
        del ratios["OLMoE"]
        tight = max(abs(quartile - 1) for quartile in statistics.quantiles(ratios["itself"], n=4)) < AIM - 1
        for name, values in ratios.items():
            low, middle, high = statistics.quantiles(values, n=4)
            bound = 1.0 if name == "itself" else arithmetic(sizes, name != "observer")
            print(f"{name:<16}{record!s:<16}{middle:>7.3f}{f'{low:.3f} {high:.3f}':>16}{bound:>12.5f}")
            if name != "itself":
                worst, over = max(worst, middle), over or (middle if tight else low) > AIM
        print(f"{'':<16}told apart by its {'median' if tight else 'lower quartile: this machine is too busy for more'}")
    print(f"largest median {worst:.3f}, aim {AIM}")
    return int(over)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
    words: dict[str, Any] = dict(word.split("=", 1) for word in sys.argv[1:])
    sys.exit(main(int(words.get("rounds", 12)), int(words.get("rows", 24)), words.get("model", "18M")))
