"""transformers' own common model tests over Select-MoE: `make model-test`, or pytest tests/models/test_common.py.

What the mixin skips is listed in conftest.py; another skip is a failure.
"""

from __future__ import annotations

import sys
import unittest
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from selectmoe.modeling import SelectMoeConfig, SelectMoeForCausalLM, SelectMoeModel
from tests.models.fetch import fetch

sys.path.insert(0, str(fetch()))

from transformers_tests.test_modeling_common import ModelTesterMixin

# The mixin knows a model's kind by the names that transformers itself ships.
MODEL_MAPPING_NAMES["select_moe"] = "SelectMoeModel"
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["select_moe"] = "SelectMoeForCausalLM"


class Model:
    """What the mixin asks about a model: a small configuration and inputs."""

    batch_size, seq_length, vocab_size = 3, 7, 99
    hidden_size, num_attention_heads, num_hidden_layers = 32, 2, 2
    is_training = True

    def __init__(self, gate_mode: str, trash: str) -> None:
        self.gate_mode, self.trash = gate_mode, trash

    def get_config(self) -> SelectMoeConfig:
        return SelectMoeConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=32,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_experts=8,
            num_experts_per_tok=2,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            gate_mode=self.gate_mode,
            trash_expert_mode=self.trash,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[SelectMoeConfig, dict[str, Any]]:
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril()}


class Common(ModelTesterMixin):
    all_model_classes = (SelectMoeModel, SelectMoeForCausalLM)
    gate_mode, trash = "observer", "zero"
    test_can_init_all_missing_weights_before_2023 = True  # our file bears no year by which it would be run

    def setUp(self) -> None:
        self._tester = Model(self.gate_mode, self.trash)

    @property
    def model_tester(self) -> Model:
        return self._tester

    def _prepare_for_class(self, inputs: Any, model_class: Any, return_labels: bool = False) -> Any:
        """With labels the gates' loss is asked for too: an observer's gates learn from nothing else."""
        given = super()._prepare_for_class(inputs, model_class, return_labels)
        return given | {"output_router_logits": True} if return_labels and "labels" in given else given

    @unittest.skip("the sdist holds no generation tests: ours are in test_promises.py")
    def test_generation_tester_mixin_inheritance(self) -> None: ...


class ObserverTest(Common, unittest.TestCase):
    """Gates that only read."""


class AppliedTest(Common, unittest.TestCase):
    """Gates that scale the MoE's output, and a noisy trash expert."""

    gate_mode, trash = "applied", "noise"
