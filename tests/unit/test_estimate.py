"""pytest tests/unit/test_estimate.py"""

import pytest

from selectmoe.cli import compose
from selectmoe.estimate import Model, Pool, describe, estimate, judge_of

DENSE = {"hidden_size": 100, "intermediate_size": 300, "num_hidden_layers": 10}
LLAMA = Model(1_900_000, 3_800_000, DENSE)
POOL = Pool(rows=1000, text=400_000, answers=200_000, held=100)


def config(**words):
    given = {"data": "d", "source_model": "m", "output_dir": "o", "ingest.holdout": "100"} | words
    return compose("run", [f"{key}={value}" for key, value in given.items()])


def test_upcycling_copies_the_mlp_and_runs_at_the_dense_speed():
    judge, active = judge_of(config(judge="upcycle", **{"upcycle.experts": "4"}), LLAMA)
    assert judge.parameters == 1_900_000 + 3 * 900_000
    assert active == 1_900_000
    assert judge.bytes == 2 * judge.parameters


def test_flops_follow_rows_arms_and_epochs():
    one = estimate(config(budget="50"), POOL, 50, LLAMA, LLAMA)
    more = estimate(config(budget="50", arms="[selected,random,top,length]"), POOL, 50, LLAMA, LLAMA)
    scored = estimate(config(budget="50", **{"route.nll": "true"}), POOL, 50, LLAMA, LLAMA)
    assert one["flops"]["route"] == 2 * 1_900_000 * 100_000
    assert one["flops"]["finetune"] == 4 * 1_900_000 * 2 * 5 * 4 * 50 * 100
    assert more["flops"]["finetune"] == 2 * one["flops"]["finetune"]
    assert scored["flops"]["route"] == 2 * one["flops"]["route"]
    assert one["hours"]["cpu"] > one["hours"]["a100"] > one["hours"]["h100"]


def test_bytes_hold_the_adapters_of_every_tuning():
    small, large = (
        estimate(config(budget="50", **{"finetune.training.lora_r": r}), POOL, 50, LLAMA, LLAMA) for r in ("8", "16")
    )
    adapter = 4 * 8 * 4 * 200 * 10
    assert large["bytes"]["output_dir"] - small["bytes"]["output_dir"] == 2 * 10 * adapter


@pytest.mark.parametrize("judge", ["pretrain", "upcycle"])
def test_a_judge_from_anything_has_a_cost_that_reads(judge):
    source = None if judge == "pretrain" else LLAMA
    words = {"source_model": "", "judge": judge} if judge == "pretrain" else {"judge": judge}
    text = describe(estimate(config(budget="50", **words), POOL, 50, source, None))
    assert "1000 rows" in text
    assert "50 rows are selected" in text
    assert len(text.splitlines()) == 5
