"""A model that writes the version of its weights: the exact version of every token can be read from its text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from common.weights import Bucket, buckets
from tests.fakes import WORDS, save_tiny_model

# Version v of the model writes token 4 + v; as many versions as there are words.
VERSIONS = range(1, len(WORDS) - 4)


def save_model_that_writes_its_version(directory: Path) -> Path:
    """Attention and MLP add nothing and all tokens have one embedding, so every position has the same final state. The
    head's row for token 4 points along it, so this token is always written."""
    save_tiny_model(directory, tied=False)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[4] = 0.5  # a logit of 32 against 0
    model.save_pretrained(directory)
    return directory


def head_moved(tensors: Mapping[str, Tensor], version: int) -> list[Bucket]:
    """The weights that write token 4 + version."""
    head = torch.roll(tensors["lm_head.weight"], version, dims=0)
    return list(buckets({**tensors, "lm_head.weight": head}.items(), version, bucket_bytes=10_000))
