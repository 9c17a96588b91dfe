"""The baseline of a response: the other responses to its prompt. An entry of `ADVANTAGES` (learner/ppo/advantages.py).
Runs in every learner rank."""

from __future__ import annotations

import torch
from torch import Tensor

from common.model.masking import check_no_holes, last_places


def leave_one_out(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    groups: Tensor,
    gamma: float = 1.0,
    lam: float | Tensor = 1.0,
    value_lam: float | Tensor | None = None,
    ends: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """RLOO (Ahmadian et al. 2024, arXiv:2402.14740): A_i = R_i - mean of R_j over the other responses j of the group,
    the same for every token of response i.

    The whole response is one action, so R_i is the plain sum of its rewards: its score less its KL penalties. Values,
    gamma and the lambdas play no part. A response alone in its group has advantage 0. An empty response is in no group:
    its score is on none of its tokens.

    If a response is several sequences, each sequence is one action with the sum of its own rewards. In the baseline,
    R_j is the mean over the sequences of response j, so a response with more sequences does not count more.
    """
    check_no_holes(mask)
    ends = last_places(mask) if ends is None else ends & mask
    number, count = ends.cumsum(1) - ends.long(), ends.sum(1)  # [B, R]: sequence of a token; [B]: sequences
    totals = torch.stack(  # [B, sequences]; float64: each baseline comes from a difference of sums
        [
            torch.where(mask & (number == sequence), rewards, 0.0).double().sum(1)
            for sequence in range(max(1, *count.tolist()))
        ],
        dim=1,
    )
    whole, written = totals.sum(1) / count.clamp(min=1), mask.any(1).double()
    _, group = groups.unique(return_inverse=True)
    group_total, members = (torch.zeros_like(whole).index_add(0, group, x)[group] for x in (whole, written))
    baseline = (group_total - whole) / (members - 1).clamp(min=1)

    def on_every_token(x: Tensor) -> Tensor:
        own = x.to(rewards.dtype).gather(1, number.clamp(max=x.shape[1] - 1))
        return torch.where(mask, own, 0.0)

    advantages = torch.where(members[:, None] > 1, totals - baseline[:, None], 0.0)
    return on_every_token(advantages), on_every_token(totals)
