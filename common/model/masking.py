"""Means, variances and whitening over the True places of a mask. A mask is True where something counts."""

from __future__ import annotations

import torch
from torch import Tensor


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """[B] lengths to a [B, width] mask: True on the first `lengths[b]` places of row b."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x where mask is True; what stands elsewhere, NaN included, is never looked at."""
    return torch.where(mask, x, 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is True; 0 where nothing counts."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Population variance of x where mask is True."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def whiten(x: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Zero mean and unit variance over the True places, zero elsewhere."""
    centred = x - masked_mean(x, mask)
    return torch.where(mask, centred * torch.rsqrt(masked_var(x, mask) + eps), 0.0)


def round_up(count: int, multiple: int) -> int:
    """The next multiple, or `count` if it is one."""
    return -(-count // multiple) * multiple
