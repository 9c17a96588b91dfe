"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) on a policy, through peft: W + (alpha / rank) B A.

B starts at zero, so training starts from the weights as they were, and with the adapters off the policy is its own
reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from common.config import LoRAConfig, UserError
from learner.distributed import whole

_NAME = "default"


def add(model: PreTrainedModel, cfg: LoRAConfig, *, seed: int) -> None:
    """Freezes the model and puts adapters, float32, on its linear layers. Raises UserError if it has none of those."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of A, which starts at random: the same on every rank, and in a repeated run
        try:
            model.add_adapter(_peft_config(cfg), adapter_name=_NAME)
        except ValueError as error:
            raise UserError(f"learner.lora.targets ({cfg.targets}) does not fit the model: {error}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
        if is_adapter(name):
            parameter.data = parameter.data.float()


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is LoRA's."""
    return ".lora_" in name


def plain_name(name: str) -> str:
    """The name that a frozen weight has without adapters."""
    return name.replace(".base_layer.", ".")


def merged(model: PreTrainedModel, name: str, weight: Tensor) -> Tensor:
    """The weight called `name`, in full, with its adapter added, float32; as it is if it has none."""
    module_name, _, kind = name.rpartition(".base_layer.")
    layer = model.get_submodule(module_name) if module_name else None
    if kind != "weight" or not isinstance(layer, LoraLayer):
        return weight
    down, up = (whole(part.get_parameter(f"{_NAME}.weight")).float() for part in (layer.lora_A, layer.lora_B))
    return torch.addmm(weight.float(), up, down, alpha=layer.scaling[_NAME])


@contextmanager
def off(model: PreTrainedModel) -> Iterator[None]:
    """Without adapters while it lasts."""
    layers = [(layer, layer.scaling[_NAME]) for layer in model.modules() if isinstance(layer, LoraLayer)]
    for layer, _ in layers:
        layer.scaling[_NAME] = 0.0
    try:
        yield
    finally:
        for layer, scaling in layers:
            layer.scaling[_NAME] = scaling


def save(adapters: dict[str, Tensor], cfg: LoRAConfig, base: str, directory: Path) -> None:
    """Writes adapters, by the names that `add` gave them, as peft reads them beside the model called `base`."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {"base_model.model." + name.replace(f".{_NAME}.", "."): value for name, value in adapters.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, directory / "adapter_model.safetensors")
    peft_config = _peft_config(cfg)
    peft_config.base_model_name_or_path = base
    peft_config.save_pretrained(str(directory))


def _peft_config(cfg: LoRAConfig) -> LoraConfig:
    named = [cfg.targets] if isinstance(cfg.targets, str) else list(cfg.targets)
    targets = named if named != ["all-linear"] else "all-linear"  # any other string peft would take for a pattern
    return LoraConfig(r=cfg.rank, lora_alpha=cfg.alpha, target_modules=targets, task_type="CAUSAL_LM")
