"""The size of an engine's KV cache, given or derived from its share of a GPU."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from actors.generation.kv_cache import free_share_at_start, kv_cache_bytes
from common.config.actors import GeneratorsConfig
from common.errors import UserError
from common.model.size import CONTEXT
from tests.fakes import QWEN_1_5B

GIB = 1 << 30
# Qwen2.5-1.5B: 28 layers, 2 key-value heads of 128, in bfloat16 28,672 bytes a token.
MODEL = replace(QWEN_1_5B, intermediate=None)  # then taken as four times the hidden width


def size(device_gib, *, max_tokens=1024, **settings):
    cfg = GeneratorsConfig(**settings)
    return kv_cache_bytes(cfg, MODEL, max_tokens=max_tokens, device_memory=device_gib * GIB)


def test_a_given_size_is_shared_by_the_devices():
    assert size(80, gpus=1, kv_cache_mib=512) == 512 << 20
    assert size(80, gpus=2, tensor_parallel=2, kv_cache_mib=512) == 256 << 20
    assert size(0) == 256 << 20  # the default on the CPU


# Besides weights and cache: 2 GiB, and 6 copies of float32 logits of 256 rows of 151,936. Activations of 8,192 tokens
# are fewer: 3 * 4 * 1536 + 6 * 1536 values for each, 0.45 GB in bfloat16.
OTHER = 2 * GIB + 6 * 4 * 256 * 151_936


def test_the_rest_of_a_share_is_cache():
    whole, parameters = int(0.92 * 80 * GIB), 1_543_714_304
    assert size(80, gpus=1) == whole - 2 * parameters - OTHER
    assert size(80, gpus=0.25) == 20 * GIB - 2 * parameters - OTHER
    assert size(80, gpus=1, dtype="float32") == whole - 4 * parameters - OTHER
    assert size(80, gpus=2, tensor_parallel=2) == whole - parameters - OTHER  # half of the weights on each


def test_the_largest_step_counts_if_it_takes_more_than_the_sampler():
    # 100,000 tokens, each 3 * 4 * 1536 + 6 * 1536 = 27,648 values of 2 bytes.
    usual, larger = size(80, gpus=1), size(80, gpus=1, max_batched_tokens=100_000)
    assert usual - larger == 100_000 * 27_648 * 2 - 6 * 4 * 256 * 151_936


def test_a_share_that_holds_no_sequence_is_refused():
    # 6 of 80 GiB: 2.88 for the weights, 2.87 for the rest, 261 MiB left. 1,024 tokens are 28 MiB.
    assert size(80, gpus=0.075) == 6 * GIB - 2 * 1_543_714_304 - OTHER
    with pytest.raises(UserError) as caught:
        size(80, gpus=0.075, max_tokens=10_000)
    assert str(caught.value) == (
        "generators.gpus (0.075) gives an engine 6144 MiB of each GPU: its weights take 2944, everything else 2938, "
        "and the rest must hold at least one sequence of 10000 tokens, 274 MiB; raise generators.gpus or "
        "generators.tensor_parallel"
    )


@pytest.mark.parametrize("gib", [16, 24, 40, 80, 141])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.89, 0.9, 0.91, 0.92, 0.95, 1])
def test_an_engine_starts_next_to_neighbours_that_fill_their_shares(share, gib):
    """vLLM refuses to start if less than its share is free once its own CUDA context is there."""
    asked = math.ceil(gib * GIB * free_share_at_start(GeneratorsConfig(gpus=share), device_memory=gib * GIB))
    assert asked <= share * gib * GIB - CONTEXT
    # Less than a share that is too small for the context and the graphs is never asked for; otherwise all of it is.
    assert asked >= min(share, 0.92) * gib * GIB - 2 * GIB
