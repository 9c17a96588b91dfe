"""The size of an engine's KV cache, as pure arithmetic. Runs in the driver and in each generator."""

from __future__ import annotations

from common.config.actors import GeneratorsConfig
from common.errors import UserError
from common.memory import MIB
from common.model.size import ModelSize, pass_bytes

CONTEXT_AND_GRAPHS = 2 << 30  # memory that CUDA's context and CUDA graphs take on each device
USABLE = 0.92  # the share of a GPU that an engine uses at most, also with generators.gpus = 1


def bytes_per_sequence(cfg: GeneratorsConfig, model: ModelSize, *, max_tokens: int) -> tuple[int, int]:
    """Tokens of the longest sequence, and the bytes of its keys and values over all devices of an engine."""
    tokens = min(max_tokens, model.context)
    kv_heads = max(model.kv_heads, cfg.tensor_parallel)  # every device has at least one
    return tokens, tokens * 2 * model.layers * kv_heads * model.head_dim * bytes_per_value(cfg)


def bytes_per_value(cfg: GeneratorsConfig) -> int:
    """Bytes of a weight, and of a number in the KV cache."""
    return 2 if cfg.dtype == "bfloat16" else 4


def other_bytes(cfg: GeneratorsConfig, model: ModelSize) -> int:
    """Memory on each device besides weights and KV cache: context, graphs, and the activations of the largest step, or
    the logits of the sampler if they take more."""
    tokens = max(cfg.max_batched_tokens, cfg.max_running)
    step = pass_bytes(model, tokens, value_bytes=bytes_per_value(cfg), parts=cfg.tensor_parallel)
    logits = 6 * 4 * cfg.max_running * model.vocabulary  # float32: the sampler's copies, sorted values, indices
    return CONTEXT_AND_GRAPHS + max(step, logits)


def free_share_at_start(cfg: GeneratorsConfig, *, device_memory: int) -> float:
    """The share of a device's memory that must be free when an engine starts. `device_memory`: its total, bytes. The
    memory of CUDA's context is not in it, because it is allocated by then. Otherwise vLLM would refuse to start an
    engine when other engines on the device fill their shares."""
    return max(0.01, min(cfg.gpus, USABLE) - CONTEXT_AND_GRAPHS / device_memory)


def kv_cache_bytes(cfg: GeneratorsConfig, model: ModelSize, *, max_tokens: int, device_memory: int) -> int:
    """Bytes of the KV cache on each device. `device_memory` is the total memory of one device. Without
    `generators.kv_cache_mib` the cache gets the rest of the engine's share after its weights and `other_bytes`. Raises
    UserError if the rest cannot hold one sequence of `max_tokens`."""
    parts = cfg.tensor_parallel
    if cfg.kv_cache_mib is not None:
        return cfg.kv_cache_mib * MIB // parts
    share = int(min(cfg.gpus, USABLE) * device_memory)
    weights = bytes_per_value(cfg) * model.parameters // parts
    other = other_bytes(cfg, model)
    left = share - weights - other
    tokens, sequence = bytes_per_sequence(cfg, model, max_tokens=max_tokens)
    if left * parts < sequence:
        raise UserError(
            f"generators.gpus ({cfg.gpus:g}) gives an engine {share // MIB} MiB of each GPU: its weights take "
            f"{weights // MIB}, everything else {other // MIB}, and the rest must hold at least one sequence "
            f"of {tokens} tokens, {-(-sequence // parts // MIB)} MiB; raise generators.gpus or "
            "generators.tensor_parallel"
        )
    return left
