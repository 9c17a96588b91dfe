"""Lets Ratchet's attention run on torch 2.10 and 2.11, whose `varlen_attn` has no argument `enable_gqa`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from common.model import attention
from tests.gpu_check.run import Run


def adapt(run: Run) -> None:
    """Replaces the function that Ratchet calls, if this torch is older than the one that Ratchet is installed with."""
    original = attention.varlen_attn
    known = inspect.signature(original).parameters
    if "enable_gqa" in known or "window_size" not in known:
        return
    shares_keys = run.on_gpu and _shares_keys(original, run.device)
    how_called = "without it" if shares_keys else "with keys and values repeated"
    run.figure(f"varlen_attn of this torch has no enable_gqa, and is called {how_called}")

    def without_enable_gqa(q: Tensor, k: Tensor, v: Tensor, *ends: Any, enable_gqa: bool = False, **how: Any) -> Any:
        if not shares_keys:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        return original(q, k, v, *ends, **how)

    attention.varlen_attn = without_enable_gqa  # type: ignore[assignment]


def _shares_keys(varlen_attn: Any, device: torch.device) -> bool:
    """True if the function takes fewer heads of keys and values than of queries, as its kernel does."""
    q, k = (torch.randn(4, n, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for n in (2, 1))
    ends = torch.tensor([0, 4], device=device, dtype=torch.int32)
    try:
        varlen_attn(q, k, k, ends, ends, 4, 4, window_size=(-1, 0)).sum().backward()
    except (RuntimeError, ValueError):
        return False
    return True
