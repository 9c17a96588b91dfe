"""Advantage estimators: how much better each token did than expected. Runs in every learner rank.

Each is a pure function of tensors [B, R] with the mask True on the tokens of a response, and is one entry of
`ADVANTAGES`, the table behind `ppo.advantages`. Values outside the mask are ignored, and results are zero there.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from common.model.masking import check_no_holes, sequence_lengths
from learner.ppo.leave_one_out import leave_one_out

Lambda = float | Tensor  # one for all, or one for each token, [B, R]


class Estimator(Protocol):
    """One rule of the table."""

    def __call__(
        self,
        rewards: Tensor,
        values: Tensor,
        mask: Tensor,
        *,
        groups: Tensor,
        gamma: float,
        lam: Lambda,
        value_lam: Lambda | None,
        ends: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Advantages, and the returns that a critic learns from, both [B, R].

        rewards, values: per token [B, R]; values are zeros in a run without a critic. groups: int64 [B], equal for
        responses to the same prompt. value_lam: lambda of the returns; None: lam. ends: bool [B, R], True on the last
        token of each sequence; None: each response is one. Raises ValueError for a mask with holes.
        """


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: Lambda,
    value_lam: Lambda | None = None,
    groups: Tensor | None = None,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438, eq. 16).

    A response is a finished episode: nothing follows its last token. If it is several sequences, nothing follows the
    last token of each. The returns are V plus the advantages that `value_lam` gives ("decoupled GAE",
    arXiv:2503.01491): with 1 they are sums of rewards, whatever the critic says.
    """
    check_no_holes(mask)
    errors = td_errors(rewards, values, mask, gamma=gamma, ends=ends)
    advantages = _decaying_sums(errors, gamma * lam, ends)
    gains = advantages if value_lam is None else _decaying_sums(errors, gamma * value_lam, ends)
    return advantages, torch.where(mask, gains + values, 0.0)


def _decaying_sums(errors: Tensor, decay: Lambda, ends: Tensor | None) -> Tensor:
    """A_t = errors_t + decay_t A_(t+1), [B, R], from the last column backwards. A_(t+1) is 0 where a sequence ends."""
    decays = decay.unbind(1) if isinstance(decay, Tensor) else [decay] * errors.shape[1]
    sums, following = torch.zeros_like(errors), errors.new_zeros(errors.shape[0])
    for t in reversed(range(errors.shape[1])):
        if ends is not None:
            following = torch.where(ends[:, t], 0.0, following)
        following = errors[:, t] + decays[t] * following
        sums[:, t] = following
    return sums


def length_lambdas(mask: Tensor, ends: Tensor, *, alpha: float) -> Tensor:
    """1 - 1 / (alpha length) for the tokens of each sequence, at least 0, float32 [B, R] (VAPO, arXiv:2504.05118)."""
    return (1 - 1 / (alpha * sequence_lengths(mask, ends).double())).clamp(min=0).float()


def td_errors(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, ends: Tensor | None = None) -> Tensor:
    """The critic's error at each token, [B, R]: r_t + gamma V_(t+1) - V_t, the terms that `gae` sums. V is 0 after the
    last token of a sequence."""
    values = torch.where(mask, values, 0.0)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    if ends is not None:
        next_values = torch.where(ends, 0.0, next_values)
    return torch.where(mask, rewards + gamma * next_values - values, 0.0)


def returns_to_go(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, ends: Tensor | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """REINFORCE without a baseline (Williams 1992): A_t = r_t + gamma r_(t+1) + gamma^2 r_(t+2) + ...

    That is GAE with values of zero and lam = 1. The given values and lambdas play no part.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0, ends=ends)


# By the name in `ppo.advantages`. Only `gae` reads values; all other code asks `PPOConfig.has_critic`.
ADVANTAGES: dict[str, Estimator] = {"gae": gae, "group": leave_one_out, "returns": returns_to_go}
