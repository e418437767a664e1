"""The models that `route` can read a pool with, and where in them its outputs are taken.

No command runs this module. Three kinds: Select-MoE (gates and routers), plain mixtures of experts (routers only: no gate
says how good a row is, its routing can still be clustered), and dense models (no router either: a row is the weighted mean
of its last hidden states, as RDS+ takes it, https://arxiv.org/abs/2503.01807).

What a router says is taken where it says it, by a hook, before anything else is made of it: transformers' own
`router_logits` were probabilities in some versions and are logits in others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selectmoe.checkpoint import Source, read
from selectmoe.device import default_dtype
from selectmoe.errors import UserError
from selectmoe.gates import QualityScore
from selectmoe.modeling import OriginalOlmoe, load_judge, realign

SELECT_MOE = "select_moe"
PLAIN_MOE = ("olmoe", "qwen2_moe", "qwen3_moe")
DENSE = ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo", "olmo2", "gpt_neox", "gpt2")
"""Those whose logits are what the lm_head says of the last hidden state, and nothing else."""
ROUTER = "TopKRouter"
"""How the class of a router's module ends (or one that it subclasses); the first thing it returns are its raw logits [tokens, E]."""


class NoExperts(nn.Module):
    """Stands where nobody reads what the experts say: the last layer's, when only the routers are asked."""

    def forward(self, hidden: Tensor, *_: Any) -> Tensor:
        """Zeros of the same shape."""
        return torch.zeros_like(hidden)


@dataclass
class Family:
    """A loaded model and the modules that are listened to, in the order of the layers."""

    model: Any
    routers: Sequence[nn.Module]
    gates: Sequence[nn.Module]

    @property
    def embeds(self) -> bool:
        """Whether a row becomes an embedding, because there is no router to listen to."""
        return not self.routers

    def check_exportable(self) -> None:
        """Refuse a model whose router data the predecessor's files could not hold.

        Raises:
            UserError: it has no gates.
        """
        if not self.gates:
            raise UserError("export_legacy=true needs a judge with gates (a Select-MoE checkpoint): leave it out")

    def skip_last_experts(self) -> None:
        """Leave out the experts of the last layer, whose output only the lm_head would read; no router logit changes."""
        blocks = [m for m in self.model.modules() if hasattr(m, "experts") and hasattr(m, "gate")]
        if blocks:
            blocks[-1].experts = NoExperts()
            if hasattr(blocks[-1], "shared_expert"):
                blocks[-1].shared_expert = NoExperts()


def load(path: str, device: torch.device, trash_expert: str = "") -> Family:
    """Load a checkpoint of any of the three kinds, in eval mode.

    Args:
        path: a folder, `s3://` or a hub name.
        device: where it goes.
        trash_expert: see `selectmoe.modeling.load_judge`.

    Raises:
        UserError: there is no checkpoint, or it is of none of these kinds.
    """
    from selectmoe import cache

    folder, _ = cache.locate(path, "selector_model.path")
    known = (SELECT_MOE, *PLAIN_MOE, *DENSE)
    source = read(folder, f"selector_model.path={path}", known, "give a Select-MoE, OLMoE, Qwen-MoE or dense model")
    if source.config["model_type"] == SELECT_MOE:
        model: Any = load_judge(folder, device, default_dtype(device), trash_expert)
    elif trash_expert:
        raise UserError("selector_model.trash_expert is read by Select-MoE checkpoints only: leave it out")
    else:
        model = _plain(source).to(device).eval()
        realign(model)
    routers = [m for m in model.modules() if any(c.__name__.endswith(ROUTER) for c in type(m).__mro__)]
    gates = [m for m in model.modules() if isinstance(m, QualityScore)]
    if source.config["model_type"] in PLAIN_MOE and not routers:
        raise UserError(f"selector_model.path={path}: the model has no MoE layer whose router could be read")
    return Family(model, routers, gates)


def _plain(source: Source) -> Any:
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours = source.config["model_type"] == "olmoe" and "qk_norm" in source.config
    return (OriginalOlmoe if ours else AutoModelForCausalLM).from_pretrained(source.path, dtype=default_dtype(device))
