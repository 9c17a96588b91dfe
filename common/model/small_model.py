"""Builds a small random model with the architecture of a large one, to test its layers within seconds.

Runs in the driver.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import gcd

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from common.model.attention import PACKED
from common.model.probe import UnsuitedModelError, check_packed, eager_results
from common.model.rotary import use_own_lengths

LAYERS, VOCABULARY, EXPERTS, WIDTH = 3, 96, 8, 64
# Shorter than the probe's sequences, so that the probe also covers positions beyond a window or an original length.
WINDOW = 5
ORIGINAL_LENGTH = 12
_LARGEST = 120_000_000  # parameters of a small model; it takes two seconds


def try_small(config: PretrainedConfig, install: Callable[[PreTrainedModel], object] | None = None) -> None:
    """Raises UnsuitedModelError if a small model of this type fails the probe.

    Accepts a type that cannot be made small: the probe of the whole model decides later.
    """
    for narrow in (True, False):
        try:
            model = random_model(small_config(config, narrow=narrow))
            expected = None if model is None else eager_results(model)
        except UnsuitedModelError:
            raise
        except Exception as error:
            if PACKED in str(error):  # a KeyError: its attention does not come from transformers' registry
                raise UnsuitedModelError("it has its own attention code, which cannot be replaced") from error
            continue  # its sizes depend on each other, or the model does not run at all
        if model is not None and expected is not None:
            if install is not None:
                install(model)
            check_packed(model, expected)
        return


def random_model(config: PretrainedConfig) -> PreTrainedModel | None:
    """A model in eval mode with packed attention. None if it has too many parameters for a quick test."""
    with torch.device("meta"):
        if sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) > _LARGEST:
            return None
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=PACKED)
    use_own_lengths(model)
    return randomise(model.eval())


def small_config(config: PretrainedConfig, *, narrow: bool = True) -> PretrainedConfig:
    """A copy with few layers and experts, narrow feed-forward layers, a small vocabulary and short windows. `narrow`:
    also with few heads. Sizes of heads, types of layers and all operations stay unchanged."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    for part in _parts(small):
        _shrink(part)
    _shorten_rope(text)
    if narrow:
        _keep_heads(text)
    return small


def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Sets every parameter to random values that affect the result: a new model has zero biases and unit norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.2 * noise)
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.weight.mul_(module.weight.shape[-1] ** 0.5)
    return model


def _parts(config: PretrainedConfig) -> list[PretrainedConfig]:
    """The config and all configs nested in it."""
    inside = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    return [config, *(part for nested in inside for part in _parts(nested))]


def _shrink(config: PretrainedConfig) -> None:
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > 0:
        _keep_layers(config, layers)
    longest = getattr(config, "max_position_embeddings", None) or 0  # a window of this length excludes nothing
    for name, value in list(vars(config).items()):
        if type(value) is not int or value <= 0:
            continue
        if any(word in name for word in ("intermediate", "ffn", "n_inner")):
            setattr(config, name, min(value, WIDTH))
        elif name.startswith("vocab_size"):
            setattr(config, name, min(value, VOCABULARY))
        elif name.endswith("token_id"):
            setattr(config, name, value % VOCABULARY)
        elif name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
            setattr(config, name, min(value, max(EXPERTS, 2 * (getattr(config, "n_group", None) or 1))))
        elif name in ("sliding_window", "attention_chunk_size") and value < longest:
            setattr(config, name, min(value, WINDOW))
        elif name.startswith("index_") and ("topk" in name or "block_size" in name):
            setattr(config, name, min(value, 2))  # attention to selected tokens; with few tokens it selects all
    experts = [v for k, v in vars(config).items() if k in ("num_experts", "num_local_experts", "n_routed_experts")]
    chosen = getattr(config, "num_experts_per_tok", None)
    if experts and isinstance(chosen, int):
        config.num_experts_per_tok = min(chosen, max(1, min(e for e in experts if e) // 2))


def _keep_layers(config: PretrainedConfig, layers: int) -> None:
    """Keeps the first layers, and the first layer of every type that is not among them."""
    kept = list(range(min(layers, LAYERS)))
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list) and len(kinds) == layers:
        kept += [kinds.index(kind) for kind in dict.fromkeys(kinds) if kind not in kinds[: len(kept)]]
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == layers:
            setattr(config, name, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)
    if (getattr(config, "first_k_dense_replace", None) or 0) > 1:
        config.first_k_dense_replace = 1


def _keep_heads(config: PretrainedConfig) -> None:
    """Keeps as few heads as possible. Their size, and the number of heads that share keys and values, stay the same."""
    heads, hidden = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if not (type(heads) is int and type(hidden) is int and heads > 1):
        return
    shared = getattr(config, "num_key_value_heads", None) or heads
    fewer = gcd(heads, hidden) if shared == 1 else gcd(gcd(heads, shared), hidden)
    least = heads if shared == 1 else shared
    factors = [f for f in range(1, fewer + 1) if fewer % f == 0]
    factor = max((f for f in factors if least // f >= 2), default=1)
    if factor == 1:
        factor = max(factors)
    if (hidden // factor) % 2 or factor == 1:
        return
    config.hidden_size, config.num_attention_heads = hidden // factor, heads // factor
    if getattr(config, "num_key_value_heads", None):
        config.num_key_value_heads = max(1, shared // factor)


def _shorten_rope(config: PretrainedConfig) -> None:
    """Sets the original context of rotary embeddings that change beyond it to ORIGINAL_LENGTH."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return
    for one in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if "original_max_position_embeddings" in one or one.get("rope_type") == "longrope":
            one["original_max_position_embeddings"] = ORIGINAL_LENGTH
        if one.get("rope_type") == "dynamic":
            config.max_position_embeddings = ORIGINAL_LENGTH
