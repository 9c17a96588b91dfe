"""AdamW with a learning rate per part of the network, and the schedule of that rate. Runs in every trainer rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from common.config.training import AdamWConfig


def make_optimizer(parts: Sequence[tuple[nn.Module, float]], cfg: AdamWConfig) -> torch.optim.AdamW:
    """AdamW over (module, peak learning rate) pairs, with weight decay on matrices only."""
    return torch.optim.AdamW(_groups(parts, cfg), fused=True)


def reconfigure(optimizer: torch.optim.Optimizer, parts: Sequence[tuple[nn.Module, float]], cfg: AdamWConfig) -> None:
    """Gives an optimizer of `make_optimizer` other settings. Its moments stay."""
    for group, new in zip(optimizer.param_groups, _groups(parts, cfg), strict=True):
        group.update({key: value for key, value in new.items() if key != "params"})


def _groups(parts: Sequence[tuple[nn.Module, float]], cfg: AdamWConfig) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = []
    for part, rate in parts:
        parameters = [p for p in part.parameters() if p.requires_grad]
        for decay, chosen in (
            (cfg.weight_decay, [p for p in parameters if p.ndim >= 2]),
            (0.0, [p for p in parameters if p.ndim < 2]),
        ):
            if chosen:
                rates = {"lr": rate, "peak_lr": rate, "weight_decay": decay}
                groups.append({"params": chosen, **rates, "betas": cfg.betas, "eps": cfg.eps})
    return groups


def set_learning_rate(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Sets the rate of every part to `scale` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * scale


def learning_rate_scale(step: int, num_steps: int, cfg: AdamWConfig) -> float:
    """Share of the peak learning rate at `step`: a linear rise over warmup_steps, then the schedule. A linear or cosine
    schedule reaches zero at `num_steps`, one step after the last."""
    if step < cfg.warmup_steps:
        return (step + 1) / (cfg.warmup_steps + 1)
    progress = (step - cfg.warmup_steps) / max(1, num_steps - cfg.warmup_steps)
    match cfg.schedule:
        case "linear":
            return max(0.0, 1 - progress)
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        case _:
            return 1.0
