"""Which kernels the GPU spends its time on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

OPERATION = re.compile(r"\w*(?:Functor|Ops|_kernel_cuda|copy|fill)\w*")


def kernel_times(work: Callable[[], Any], most: int = 10) -> str:
    """Milliseconds by kernel, the largest first, and the sum over all kernels."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        work()
        torch.cuda.synchronize()
    spent: Counter[str] = Counter()
    launches = 0
    for event in trace.key_averages():
        spent[short(event.key)] += event.self_device_time_total / 1e3
        launches += event.count if event.self_device_time_total else 0  # calls of the CUDA library are listed too
    listed = ", ".join(f"{name} {took:.1f}" for name, took in spent.most_common(most))
    return f"{sum(spent.values()):.1f} in all in {launches} launches: {listed}"


def short(kernel: str) -> str:
    """The kernel's name without its template arguments; for torch's element-wise kernels, with the operation."""
    name = kernel.removeprefix("void ").replace("at::native::", "").replace("(anonymous namespace)::", "")
    head, _, arguments = name.partition("<")
    if "elementwise" not in head and "reduce" not in head:
        return head[-48:]
    operation = OPERATION.search(arguments)
    return f"{head.partition('_kernel')[0]} {operation[0] if operation else arguments}"[:64]
