"""The size of an engine's KV cache, given or derived from its share of a GPU."""

from __future__ import annotations

import pytest

from actors.generation.kv_cache import kv_cache_bytes
from common.config.actors import GeneratorsConfig
from common.errors import UserError
from common.model.size import ModelSize

GIB = 1 << 30
# Qwen2.5-1.5B: 28 layers, 2 key-value heads of 128, in bfloat16 28,672 bytes a token.
MODEL = ModelSize(
    parameters=1_543_714_304,
    layers=28,
    hidden=1536,
    heads=12,
    kv_heads=2,
    head_dim=128,
    vocabulary=151_936,
    context=32_768,
)


def size(device_gib, *, max_tokens=1024, **settings):
    cfg = GeneratorsConfig(**settings)
    return kv_cache_bytes(cfg, MODEL, max_tokens=max_tokens, device_memory=device_gib * GIB)


def test_a_given_size_is_shared_by_the_devices():
    assert size(80, gpus=1, kv_cache_mib=512) == 512 << 20
    assert size(80, gpus=2, tensor_parallel=2, kv_cache_mib=512) == 256 << 20
    assert size(0) == 256 << 20  # the default on the CPU


def test_what_a_share_leaves_is_cache():
    assert size(80, gpus=1) == 78 * GIB - 2 * 1_543_714_304
    assert size(80, gpus=0.25) == 18 * GIB - 2 * 1_543_714_304
    assert size(80, gpus=1, dtype="float32") == 78 * GIB - 4 * 1_543_714_304
    assert size(80, gpus=2, tensor_parallel=2) == 78 * GIB - 1_543_714_304  # half of the weights on each


def test_a_share_that_holds_no_sequence_is_refused():
    # A sixteenth of 80 GiB is 5 GiB: 2.88 for the weights, 2 for the rest, 128 MiB left. 1,024 tokens are 28 MiB.
    assert size(80, gpus=1 / 16) == 5 * GIB - 2 * GIB - 2 * 1_543_714_304
    with pytest.raises(UserError) as caught:
        size(80, gpus=1 / 16, max_tokens=10_000)
    assert str(caught.value) == (
        "generators.gpus (0.0625) gives an engine 5120 MiB of each GPU: its weights take 2944, everything else 2048, "
        "and what is left must hold at least one sequence of 10000 tokens, 274 MiB; raise generators.gpus or "
        "generators.tensor_parallel"
    )
