"""LoRA adapters on a judge: on its routers and on linear layers, with the quality gates trained whole beside them.

No command runs this module; `warmup training.mode=lora` trains and writes them in PEFT's form, `route` puts them into the
weights. Router weights are float32 before an adapter is added to them, in training and in `route` alike: in bfloat16 small
differences are lost.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from selectmoe.checkpoint import METADATA
from selectmoe.errors import UserError

if TYPE_CHECKING:
    from selectmoe.warmup import WarmupConfig

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
ROUTER = "mlp.gate.weight"
GATES = "quality_gate"


def linear_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers that an adapter can stand beside."""
    names = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return sorted(names - {GATES})


def check_targets(config: dict[str, Any], wanted: list[str]) -> None:
    """Prove from a judge's `config.json` that it has the layers that adapters are wanted on; no weights are read.

    Raises:
        UserError: a target module does not exist; lists those that do.
    """
    from selectmoe.modeling import SelectMoeConfig, SelectMoeForCausalLM

    with torch.device("meta"):
        empty = SelectMoeForCausalLM(SelectMoeConfig(**{k: v for k, v in config.items() if k != "model_type"}))
    known = linear_layers(empty)
    if unknown := sorted(set(wanted) - set(known)):
        raise UserError(f"training.lora.target_modules: the judge has no {unknown[0]}; it has {', '.join(known)}")


def _float_routers(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith(ROUTER):
            parameter.data = parameter.data.float()


def add_adapters(model: Any, config: WarmupConfig) -> dict[str, nn.Parameter]:
    """Put fresh, seeded adapters into a frozen model, in place.

    Returns:
        The trained parameters by name, float32.
    """
    from peft import LoraConfig, get_peft_model

    lora = config.training.lora
    _float_routers(model)
    torch.manual_seed(config.seed)
    wanted = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=sorted(lora.target_modules),
        target_parameters=[ROUTER] if config.train_routers else None,
        modules_to_save=[GATES] if config.training.train_gates else None,
        task_type="CAUSAL_LM",
    )
    model.adapted = [get_peft_model(model, wanted)]  # in a list: it is no submodule
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data = parameter.data.float()
    return trained


def save_adapters(model: Any, directory: Path) -> None:
    """Write PEFT's two files."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    adapted = model.adapted[0]
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    tensors = {k: v.detach().cpu().contiguous() for k, v in sorted(state.items())}
    save_file(tensors, directory / WEIGHTS, metadata=METADATA)
    config = adapted.peft_config["default"]
    config.target_modules, config.inference_mode = sorted(config.target_modules or ()), True
    config.save_pretrained(str(directory))


def load_adapters(model: Any, directory: Path) -> None:
    """Put trained adapters into a judge's weights, in place.

    Args:
        model: a `SelectMoeForCausalLM`.
        directory: what `warmup` wrote.

    Raises:
        UserError: a file is missing or cannot be read, or the adapter belongs to another model. The model is then unchanged.
    """
    from peft import LoraConfig, PeftModel

    found = _tensors(directory)
    try:
        config = LoraConfig.from_pretrained(str(directory))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{directory / CONFIG} cannot be read: {str(error).strip().splitlines()[0]}") from None
    wanted = _expected(model, config, directory)
    if not set(found) & set(wanted):
        raise UserError(f"{directory}: not one of its {len(found)} tensors belongs to this model (first: {min(found)})")
    if differs := sorted(set(found) ^ set(wanted)):
        which = "lacks" if differs[0] in wanted else "has one too many:"
        raise UserError(f"{directory} {which} {differs[0]} ({len(differs)} tensors differ from this model's)")
    for name, tensor in found.items():
        if tuple(tensor.shape) != wanted[name]:
            raise UserError(f"{directory}: {name} has the shape {tuple(tensor.shape)}, this model's is {wanted[name]}")
        if not tensor.isfinite().all():
            raise UserError(f"{directory}: {name} holds a value that is not finite")
    _float_routers(model)
    PeftModel.from_pretrained(model, str(directory)).merge_and_unload()


def _tensors(directory: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(directory / WEIGHTS))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{directory / WEIGHTS} cannot be read: {str(error).strip().splitlines()[0]}") from None


def _expected(model: Any, config: Any, directory: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that such an adapter of this model has, from a model without weights."""
    from peft import get_peft_model, get_peft_model_state_dict

    with torch.device("meta"):
        empty = type(model)(model.config)
        try:
            adapted = get_peft_model(empty, config)
        except ValueError as error:
            raise UserError(f"the adapter {directory} does not fit this model: {str(error)[:200]}") from None
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
