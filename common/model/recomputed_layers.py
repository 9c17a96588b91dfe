"""Gradient checkpointing for models in eval mode. Runs in every learner or reward-model rank.

transformers recomputes layers only in training mode, which would also turn on their dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Makes the model recompute its layers' activations in the backward pass instead of keeping them."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            # transformers recomputes a layer only if this flag is set. `_recomputed` clears it while the layer runs,
            # because inside the layer it would turn on dropout.
            layer.training = True
            layer._gradient_checkpointing_func = partial(_recomputed, layer, layer._gradient_checkpointing_func)


def _recomputed(layer: nn.Module, checkpoint: Callable[..., Any], forward: Callable[..., Any], *inputs: Any) -> Any:
    """Runs the layer's forward pass in eval mode through `checkpoint`, both now and when it is recomputed."""

    def in_eval_mode(*inputs: Any) -> Any:
        layer.training = False
        try:
            return forward(*inputs)
        finally:
            layer.training = True

    return checkpoint(in_eval_mode, *inputs)
