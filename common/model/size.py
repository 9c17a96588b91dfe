"""Sizes and shapes of a model from its config alone, and its few constants from its files. Runs anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from common.model.checks import read_config, reading
from common.model.remote_code import trusted
from common.model.rotary import original_length
from common.model.saved_weights import as_saved

CONTEXT = 600 << 20  # memory on a GPU of a process that has loaded CUDA's kernels and no weights, bytes


@dataclass(frozen=True)
class ModelSize:
    """The sizes that memory estimates need."""

    parameters: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int  # rows of the embedding; every token id is smaller
    context: int  # longest sequence, tokens
    intermediate: int | None = None  # width of a feed-forward layer, if the config has it
    body: Mapping[str, int] = field(
        default_factory=dict, compare=False
    )  # sizes of all weights but the output embedding


def pass_bytes(model: ModelSize, tokens: int, *, value_bytes: int, parts: int = 1) -> int:
    """Estimated memory for the activations of a forward pass without gradients, bytes: those of its largest layer.
    `parts`: devices that each layer is split over; the result is that of one of them."""
    width = 3 * (model.intermediate or 4 * model.hidden) // parts + 6 * model.hidden
    return tokens * width * value_bytes


def forward_operations(model: ModelSize, tokens: Any, answered: Any) -> Any:
    """About how many floating-point operations a forward pass of one sequence takes. `tokens`: its length. `answered`:
    the tokens that pass the output embedding. Numbers, or tensors with one element for each sequence.

    Each weight takes a multiplication and an addition for each token. Attention compares each token with those before
    it, half of tokens^2 pairs: two products of all heads, with two operations for each pair and value.
    """
    head = model.vocabulary * model.hidden
    attention = 2 * model.layers * model.heads * model.head_dim
    return 2 * (model.parameters - head) * tokens + 2 * head * answered + attention * tokens**2


def model_size(directory: Path, setting: str = "model.path") -> ModelSize:
    """Sizes of the model in `directory`. Raises UserError if the config cannot be read or lacks a size."""
    with reading(directory, setting, "be trained"):
        config = read_config(directory)
        model = without_weights(config)
        text = config.get_text_config()
        hidden, heads = _count(text, "hidden_size"), _count(text, "num_attention_heads")
        widths = getattr(text, "intermediate_size", None)
        return ModelSize(
            parameters=sum(p.numel() for p in model.parameters()),
            layers=_count(text, "num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or hidden // heads,
            vocabulary=_count(text, "vocab_size"),
            context=min(_count(text, "max_position_embeddings"), original_length(text)),
            intermediate=widths if isinstance(widths, int) else None,
            body={name: parameter.numel() for name, parameter in model.base_model.named_parameters()},
        )


def _count(config: PretrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    if type(value) is not int or value < 1:
        raise ValueError(f"its config must state {name} as a whole number above 0, but has {value!r}")
    return value


def parameter_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every weight that the learner trains and publishes, by its name in files. A tied output embedding is
    listed once, as the input embedding."""
    model = without_weights(read_config(directory))
    saved = as_saved(model, ((name, parameter.detach) for name, parameter in model.named_parameters()))
    return {name: tuple(tensor.shape) for name, tensor in saved}


def constants(directory: Path) -> dict[str, Tensor]:
    """Saved tensors of the model in `directory` that are never trained, such as the bias that balances the load of
    experts. Their names are those in its safetensors files."""
    model = without_weights(read_config(directory))
    persistent = model.state_dict().keys()
    buffers = ((name, buffer.detach) for name, buffer in model.named_buffers() if name in persistent)
    names = {name for name, _ in as_saved(model, buffers)}
    found: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors") if names else ():
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in names & set(tensors.keys())}
    return found


def without_weights(config: PretrainedConfig) -> PreTrainedModel:
    """The model on the meta device: modules and shapes, no memory for weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trusted(Path(config._name_or_path)))
