"""Prepares a model for training as the settings say: precision, adapters, recomputed activations, compiled layers.

Runs in every trainer rank.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from common.config.ppo import LearnerConfig
from common.model.compiled_layers import compile_layers
from common.model.recomputed_layers import checkpoint_activations
from learner.ppo import lora


def weights_dtype(cfg: LearnerConfig) -> torch.dtype:
    """float32; with LoRA the frozen weights are in the precision of the forward pass."""
    return torch.bfloat16 if cfg.lora is not None and cfg.precision == "bf16" else torch.float32


def prepare(model: PreTrainedModel, cfg: LearnerConfig, *, seed: int) -> None:
    """Adds what the settings ask for to a model that trains: adapters, recomputed activations, compiled layers."""
    if cfg.lora is not None:
        lora.add(model, cfg.lora, seed=seed)
    if cfg.gradient_checkpointing:
        checkpoint_activations(model)
    if cfg.compiles:
        compile_layers(model)
