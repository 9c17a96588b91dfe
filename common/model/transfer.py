"""Copies between host and GPU at the speed of their connection. Runs anywhere."""

from __future__ import annotations

import torch
from torch import Tensor


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. A copy to a GPU goes through page-locked memory, which torch keeps for later copies. A copy
    from other memory would first wait for all work that is queued on the GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def cast_on_gpu(tensor: Tensor) -> Tensor:
    """Casts a GPU tensor to bf16 before it is copied into a bf16 tensor of the host. Without the cast, the copy would
    move the GPU's larger type and cast it on one CPU core. A CPU tensor stays unchanged: its copy casts it."""
    return tensor.to(torch.bfloat16) if tensor.is_cuda else tensor
