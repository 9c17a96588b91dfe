"""Copies between host and GPU at the speed of their connection. Runs anywhere."""

from __future__ import annotations

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. On its way to a GPU it goes through page-locked memory, which torch keeps for later copies:
    a copy from other memory first waits until the GPU has done all work queued before it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def cast_on_gpu(tensor: Tensor) -> Tensor:
    """A tensor of a GPU in bf16, for a bf16 tensor of the host; others unchanged. A copy from a GPU would move its own
    type, and cast on one CPU core. A copy within the host casts on its way."""
    return tensor.to(torch.bfloat16) if tensor.is_cuda else tensor
