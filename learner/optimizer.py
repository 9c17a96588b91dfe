"""AdamW with a learning rate per part of the network, and the schedule of that rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from common.config import OptimizerConfig
from learner.policy import PolicyWithCritic


def make_optimizer(network: PolicyWithCritic, cfg: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with a learning rate per part, and weight decay on matrices only."""
    parts: list[tuple[nn.Module | None, float]] = [
        (network.policy, cfg.learning_rate),
        (network.critic_body, cfg.critic_learning_rate),
        (network.value_head, cfg.value_head_learning_rate),
    ]
    groups = []
    for part, rate in parts:
        parameters = [p for p in part.parameters() if p.requires_grad] if part is not None else []
        for decay, chosen in (
            (cfg.weight_decay, [p for p in parameters if p.ndim >= 2]),
            (0.0, [p for p in parameters if p.ndim < 2]),
        ):
            if chosen:
                groups.append({"params": chosen, "lr": rate, "peak_lr": rate, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=cfg.betas, eps=cfg.eps, fused=True)


def learning_rate_scale(step: int, num_steps: int, cfg: OptimizerConfig) -> float:
    """Share of the peak learning rate at `step`: a line up over warmup_steps, then the schedule down to zero."""
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
