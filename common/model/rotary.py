"""Rotary embeddings whose frequencies depend on the length of a sequence. Runs anywhere.

transformers chooses the frequencies of a batch by its longest sequence, and for "dynamic" also by earlier batches. Here
each sequence gets the frequencies of its own length, as if it were alone.
"""

from __future__ import annotations

import sys
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

_BY_LENGTH = ("longrope", "dynamic")


def original_length(config: PretrainedConfig) -> int:
    """The longest sequence for which vLLM and transformers agree. Beyond it vLLM 0.32 chooses frequencies by the
    longest sequence it accepts, and transformers by the current sequence."""
    found = [
        rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        for rope in _by_length(config)
    ]
    return min((length for length in found if type(length) is int and length > 0), default=sys.maxsize)


def depends_on_length(config: PretrainedConfig) -> bool:
    """True if the model's rotary frequencies depend on a sequence's length."""
    return bool(_by_length(config.get_text_config()))


def use_own_lengths(model: nn.Module) -> None:
    """Makes length-dependent rotary embeddings choose frequencies for each sequence alone. A sequence begins where the
    position is 0."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else (kinds,)
        if any(kind in _BY_LENGTH for kind in kinds):
            module.forward = MethodType(_forward, module)


def _forward(self: Any, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """cos and sin [B, N, D] at positions [B, N]."""
    forward = type(self).forward
    rows = []
    for positions in position_ids:
        starts = (positions == 0).nonzero().flatten().tolist()
        ends = [*starts[1:], len(positions)]
        parts = []
        for part in positions.split([end - start for start, end in zip([0, *starts[1:]], ends, strict=True)]):
            _reset(self)
            parts.append(forward(self, x, part[None], *args, **kwargs))
        rows.append([torch.cat(found, dim=1) for found in zip(*parts, strict=True)])
    _reset(self)
    cos, sin = (torch.cat(found) for found in zip(*rows, strict=True))
    return cos, sin


def _reset(module: Any) -> None:
    """Resets the frequencies that "dynamic" keeps from earlier, longer sequences."""
    for name in list(module._buffers):
        if name.endswith("original_inv_freq"):
            prefix = name.removesuffix("original_inv_freq")
            setattr(module, f"{prefix}inv_freq", module._buffers[name])
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _by_length(config: PretrainedConfig) -> list[dict[str, Any]]:
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return []
    return [r for r in (rope, *rope.values()) if isinstance(r, dict) and r.get("rope_type") in _BY_LENGTH]
