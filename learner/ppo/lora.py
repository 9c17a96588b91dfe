"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) on a policy, through peft: W + (alpha / rank) B A.

Runs in every learner rank. B starts at zero, so training starts from the frozen weights. With the adapters off the
policy is its own reference.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer, ParamWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.config.ppo import LoRAConfig
from common.errors import UserError
from common.model.saved_weights import NamedTensor
from learner.ranks.distributed import whole

_NAME = "default"
Adapted = Linear | ParamWrapper  # layers whose adapters can be published


def add(model: PreTrainedModel, cfg: LoRAConfig, *, seed: int) -> None:
    """Freezes the model and puts float32 adapters on the layers that `cfg.targets` names. Raises UserError if there are
    no such layers, or if their adapters could not be trained or published."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # A starts at random: the same on every rank and in a repeated run
        try:
            model.add_adapter(_peft_config(cfg), adapter_name=_NAME)
        except ValueError as error:
            raise UserError(
                f"learner.lora.targets ({cfg.targets}) does not fit the model: {error}; name linear layers, "
                'or use "all-linear" for all of them'
            ) from error
    _refuse_untrainable(model, cfg)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
        if is_adapter(name):
            parameter.data = parameter.data.float()


def is_adapter(name: str) -> bool:
    """True for the name of an adapter's parameter."""
    return ".lora_" in name


def merged(model: PreTrainedModel, gather_dtype: torch.dtype = torch.bfloat16) -> Iterator[NamedTensor]:
    """Yields, for every weight, its name without adapters, and a function that returns the weight in full with its
    adapter added. All ranks must call these functions together. Weights without adapters are gathered in
    `gather_dtype`, by default the type that is published and saved: half the bytes."""
    layers = {id(_adapted(layer)): layer for layer in model.modules() if isinstance(layer, Adapted)}
    for name, parameter in model.named_parameters():
        if not is_adapter(name):
            plain = ".".join(part for part in name.split(".") if part != "base_layer")
            yield plain, partial(_merged, parameter, layers.get(id(parameter)), gather_dtype)


def _merged(parameter: nn.Parameter, layer: Adapted | None, gather_dtype: torch.dtype) -> Tensor:
    """The parameter in full. If its layer has an adapter: in float32, with the adapter added."""
    return whole(parameter, gather_dtype) if layer is None else whole(parameter).float() + _delta(layer)


@torch.no_grad()
def _delta(layer: Adapted) -> Tensor:
    """The product that the adapter adds, in full. peft computes it, because it depends on the kind of layer: a Conv1D
    has a transposed weight, and each expert has its own product."""
    gathered = copy.copy(layer)  # shares everything that is not replaced below
    gathered._modules = dict(layer._modules)
    for kind in ("lora_A", "lora_B"):
        linear = copy.copy(getattr(layer, kind)[_NAME])
        linear._parameters = {"weight": nn.Parameter(whole(linear.weight), requires_grad=False)}
        gathered._modules[kind] = nn.ModuleDict({_NAME: linear})
    return gathered.get_delta_weight(_NAME)


def _adapted(layer: Adapted) -> nn.Parameter:
    """The frozen parameter that the layer's adapter adds to."""
    return getattr(layer.get_base_layer(), layer.parameter_name if isinstance(layer, ParamWrapper) else "weight")


def _refuse_untrainable(model: PreTrainedModel, cfg: LoRAConfig) -> None:
    """Raises UserError for adapters of embeddings, and of kinds of layers that `merged` does not support."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if layer is embedding or layer is head:
            which = "output" if layer is head else "input"
            reason = f"{name} is the {which} embedding, which cannot be adapted: it may be tied to the other one"
        elif not isinstance(layer, Adapted):
            reason = f"{name} is a {type(layer.get_base_layer()).__name__}, which cannot be adapted here"
        else:
            continue
        raise UserError(
            f'learner.lora.targets ({cfg.targets}): {reason}; name linear layers, or use "all-linear" for all of them'
        )


@contextmanager
def off(model: PreTrainedModel) -> Iterator[None]:
    """Turns the adapters off inside the with block."""
    layers = [(layer, layer.scaling[_NAME]) for layer in model.modules() if isinstance(layer, LoraLayer)]
    for layer, _ in layers:
        layer.scaling[_NAME] = 0.0
    try:
        yield
    finally:
        for layer, scaling in layers:
            layer.scaling[_NAME] = scaling


def save(adapters: dict[str, Tensor], cfg: LoRAConfig, base: str, directory: Path) -> None:
    """Writes adapters, under the names that `add` gave them, in peft's format for the model called `base`."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {"base_model.model." + name.replace(f".{_NAME}.", "."): value for name, value in adapters.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, directory / "adapter_model.safetensors")
    peft_config = _peft_config(cfg)
    peft_config.base_model_name_or_path = base
    peft_config.save_pretrained(str(directory))


def _peft_config(cfg: LoRAConfig) -> LoraConfig:
    named = [cfg.targets] if isinstance(cfg.targets, str) else list(cfg.targets)
    targets = named if named != ["all-linear"] else "all-linear"  # peft takes any other string for a pattern
    return LoraConfig(r=cfg.rank, lora_alpha=cfg.alpha, target_modules=targets, task_type="CAUSAL_LM")
