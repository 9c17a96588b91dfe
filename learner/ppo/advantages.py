"""Advantage estimators: how much better each token did than expected. Runs in every learner rank.

Each is a pure function of tensors [B, R] with the mask True on the tokens of a response, and is one entry of
`ADVANTAGES`, the table behind `ppo.advantages`. Values outside the mask are ignored, and results are zero there.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from common.model.masking import check_no_holes


class Estimator(Protocol):
    """One rule of the table."""

    def __call__(
        self, rewards: Tensor, values: Tensor, mask: Tensor, *, groups: Tensor, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        """Advantages, and the returns that a critic learns from, both [B, R].

        rewards, values: per token [B, R]; values are zeros in a run without a critic. groups: int64 [B], equal for
        responses to the same prompt. Raises ValueError for a mask with holes.
        """


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438, eq. 16).

    A response is a finished episode: nothing follows its last token.
    """
    check_no_holes(mask)
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = rewards.new_zeros(rewards.shape[0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = mask[:, t] * (delta + gamma * lam * next_advantage)
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values


def td_errors(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """The critic's error at each token, [B, R]: r_t + gamma V_(t+1) - V_t, the terms that `gae` sums. V is 0 after the
    last token."""
    values = torch.where(mask, values, 0.0)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    return torch.where(mask, rewards + gamma * next_values - values, 0.0)


def leave_one_out(
    rewards: Tensor, values: Tensor, mask: Tensor, *, groups: Tensor, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """RLOO (Ahmadian et al. 2024, arXiv:2402.14740): A_i = R_i - mean of R_j over the other responses j of the group,
    the same for every token of response i.

    The whole response is one action, so R_i is the plain sum of its rewards: its score less its KL penalties. Values,
    gamma and lam play no part. A response alone in its group has advantage 0. An empty response is in no group: its
    score is on none of its tokens.
    """
    check_no_holes(mask)
    total = torch.where(mask, rewards, 0.0).double().sum(1)  # float64: each baseline comes from a difference of sums
    written = mask.any(1).double()
    _, group = groups.unique(return_inverse=True)
    group_total, members = (torch.zeros_like(total).index_add(0, group, x)[group] for x in (total, written))
    baseline = (group_total - total) / (members - 1).clamp(min=1)

    def on_every_token(x: Tensor) -> Tensor:
        return torch.where(mask, x[:, None].to(rewards.dtype), 0.0)

    return on_every_token(torch.where(members > 1, total - baseline, 0.0)), on_every_token(total)


def returns_to_go(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, groups: Tensor | None = None, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """REINFORCE without a baseline (Williams 1992): A_t = r_t + gamma r_(t+1) + gamma^2 r_(t+2) + ...

    That is GAE with values of zero and lam = 1. The given values and lam play no part.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)


# By the name in `ppo.advantages`. Only `gae` reads values: `PPOConfig.has_critic` says so to everything else.
ADVANTAGES: dict[str, Estimator] = {"gae": gae, "group": leave_one_out, "returns": returns_to_go}
