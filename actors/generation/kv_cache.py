"""The size of an engine's KV cache, as pure arithmetic. Runs in the driver and in each generator."""

from __future__ import annotations

from common.config.actors import GeneratorsConfig
from common.errors import UserError
from common.model.size import ModelSize

MIB = 1 << 20
# Device memory of an engine beside weights and KV cache: CUDA's context, CUDA graphs, activations of one step.
OTHER = 2 << 30


def bytes_per_sequence(cfg: GeneratorsConfig, model: ModelSize, *, max_tokens: int) -> tuple[int, int]:
    """Tokens of the longest sequence, and the bytes of its keys and values over all devices of an engine."""
    tokens = min(max_tokens, model.context)
    kv_heads = max(model.kv_heads, cfg.tensor_parallel)  # every device has at least one
    return tokens, tokens * 2 * model.layers * kv_heads * model.head_dim * bytes_per_value(cfg)


def bytes_per_value(cfg: GeneratorsConfig) -> int:
    """Bytes of a weight, and of a number in the KV cache."""
    return 2 if cfg.dtype == "bfloat16" else 4


def kv_cache_bytes(cfg: GeneratorsConfig, model: ModelSize, *, max_tokens: int, device_memory: int) -> int:
    """Bytes of the KV cache on each device, which has `device_memory` bytes in all. If the config leaves its size out,
    it is what the engine's share leaves beside its weights and OTHER. Raises UserError if that holds no sequence of
    `max_tokens`."""
    parts = cfg.tensor_parallel
    if cfg.kv_cache_mib is not None:
        return cfg.kv_cache_mib * MIB // parts
    share = int(min(cfg.gpus, 1.0) * device_memory)
    weights = bytes_per_value(cfg) * model.parameters // parts
    left = share - weights - OTHER
    tokens, sequence = bytes_per_sequence(cfg, model, max_tokens=max_tokens)
    if left * parts < sequence:
        raise UserError(
            f"generators.gpus ({cfg.gpus:g}) gives an engine {share // MIB} MiB of each GPU: its weights take "
            f"{weights // MIB}, everything else {OTHER // MIB}, and what is left must hold at least one sequence "
            f"of {tokens} tokens, {-(-sequence // parts // MIB)} MiB; raise generators.gpus or "
            "generators.tensor_parallel"
        )
    return left
