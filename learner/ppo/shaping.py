"""Turns scores and a KL penalty into rewards per token. Runs in every learner rank.

learner/ppo/scores.py has normalised the scores, and learner/ppo/kl_controller.py sets the penalty's coefficient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.model.masking import check_no_holes


def k1(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """Unbiased single-sample estimate of KL(sampler || other): -x, with x = log(other) - log(sampler)."""
    return logprobs - other_logprobs


def k2(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """x^2 / 2: never negative, biased by the third order in x."""
    return (logprobs - other_logprobs) ** 2 / 2


def k3(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """exp(x) - 1 - x: unbiased and never negative.

    Where the other policy finds the token likelier (x > 0) the estimate is capped at 10 nats, as in verl, SkyRL and
    OpenRLHF. Without the cap it grows exponentially, and one token could dominate the whole batch or overflow.
    """
    x = other_logprobs - logprobs
    return torch.where(x > 0, (torch.expm1(x) - x).clamp(max=10), torch.expm1(x) - x)


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def token_rewards(
    scores: Tensor,
    kl: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    turn_rewards: Tensor | None = None,
    ends: Tensor | None = None,
) -> Tensor:
    """Rewards [B, R]: every response token pays `kl_coef * kl`, and the last one also gets the score [B].

    `turn_rewards` [B, R] are parts of the score that an environment gave before the last token. Each stays on its
    token, and the last token gets the rest. So the rewards of a response always add up to its score less its penalties.
    The turn reward of the last token is ignored: otherwise rounding would give an episode of one turn other bits than
    the same response without an environment.

    `ends` [B, R] is True on the last token of each sequence, if a response has several. Each of these tokens gets the
    score, less what turns earned before it. So without penalties, the rewards from a token to the end of its sequence
    add up to what they would be if the response were one sequence.

    An empty response has no token for its score. Raises ValueError for a mask with holes, because the score would then
    go to a token that does not count.
    """
    check_no_holes(mask)
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    lengths = mask.sum(1)
    written = lengths > 0
    before_last = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None] - 1
    ends = torch.zeros_like(mask) if ends is None else ends & before_last
    at_ends = scores[:, None].expand(mask.shape)
    if turn_rewards is not None:
        turn_rewards = torch.where(before_last, turn_rewards, 0.0)
        rewards += torch.where(ends, 0.0, turn_rewards)
        at_ends = at_ends - (turn_rewards.cumsum(1) - turn_rewards)
        scores = scores - turn_rewards.sum(1)
    rewards = torch.where(ends, rewards + at_ends, rewards)
    rewards[written, lengths[written] - 1] += scores[written]
    return rewards
