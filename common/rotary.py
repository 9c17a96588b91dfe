"""Rotary embeddings whose frequencies depend on how long a sequence is.

Runs wherever a model is loaded.
"""

from __future__ import annotations

import sys

from transformers import PretrainedConfig

_BY_LENGTH = ("longrope", "dynamic")


def original_length(config: PretrainedConfig) -> int:
    """How long a sequence may be if every engine is to compute it alike: up to here all take the same frequencies.
    Beyond, vLLM chooses them by the longest sequence it may get, and transformers by the sequence at hand."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return sys.maxsize
    found = [
        one.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        for one in (rope, *rope.values())
        if isinstance(one, dict) and one.get("rope_type") in _BY_LENGTH
    ]
    return min((length for length in found if type(length) is int and length > 0), default=sys.maxsize)
