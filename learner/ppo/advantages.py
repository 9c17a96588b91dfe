"""Generalised advantage estimation: how much better each token went than the critic predicted."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, [B, R] (Schulman et al. 2015, arXiv:1506.02438, eq. 16).

    A response is a finished episode: nothing follows its last token. What stands outside the mask is not looked at,
    and both results are zero there.
    """
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = rewards.new_zeros(rewards.shape[0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = mask[:, t] * (delta + gamma * lam * next_advantage)
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values
