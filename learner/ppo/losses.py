"""The three terms of PPO's objective (Schulman et al. 2017, arXiv:1707.06347, eq. 9), as pure functions.

Runs in every learner rank. Every loss is a sum over the True places of the mask divided by `num_tokens`, the token
count of the whole minibatch over all ranks. So neither micro-batches nor ranks can change the gradient. Each also
returns statistics, detached, as sums over tokens.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from common.model.masking import masked_sum
from learner.ppo.shaping import k3


class PolicyLoss(Protocol):
    """One rule of `POLICY_LOSSES`."""

    def __call__(self, ratio: Tensor, advantages: Tensor, *, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """The loss of each token, and True where the rule removed the token's gradient, both [B, R]. `bounds`: the
        lowest and the highest ratio that a token should have."""


def clipped_surrogate(ratio: Tensor, advantages: Tensor, *, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """max(-A ratio, -A clip(ratio)), eq. 7: nothing is gained by going beyond a bound in A's direction."""
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(*bounds)
    return torch.maximum(unclipped, clipped), clipped > unclipped


def masked_surrogate(ratio: Tensor, advantages: Tensor, *, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """-A ratio inside the bounds and 0 outside, for both signs of A (IcePop; SAO, arXiv:2607.07508)."""
    outside = (ratio < bounds[0]) | (ratio > bounds[1])
    return torch.where(outside, 0.0, -advantages * ratio), outside


# By the name in `ppo.policy_loss`. `PPOConfig.ratio_to_sampler` says what the ratio divides by.
POLICY_LOSSES: dict[str, PolicyLoss] = {"clip": clipped_surrogate, "mask": masked_surrogate}


def policy_loss(
    logprobs: Tensor,
    base_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    rule: PolicyLoss,
    bounds: tuple[float, float],
    num_tokens: int,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean of a rule's losses; all tensors [B, R].

    `base_logprobs` are of the policy that the ratio divides by. `weights` are per-token importance weights of the
    sampler (learner/ppo/mismatch.py). Statistics: `dropped`, tokens whose gradient the rule removed; `approx_kl`, k3
    estimate of KL(base || new) in nats; `ratio`.
    """
    ratio = probability_ratio(logprobs, base_logprobs, mask)
    per_token, dropped = rule(ratio, advantages, bounds=bounds)
    if weights is not None:
        per_token = per_token * weights
    with torch.no_grad():
        stats = {
            "dropped": masked_sum(dropped.float(), mask),
            "approx_kl": masked_sum(k3(torch.where(mask, base_logprobs, 0.0), torch.where(mask, logprobs, 0.0)), mask),
            "ratio": masked_sum(ratio, mask),
        }
    return masked_sum(per_token, mask) / num_tokens, stats


def probability_ratio(logprobs: Tensor, base_logprobs: Tensor, mask: Tensor) -> Tensor:
    """exp(logprobs - base_logprobs), [B, R], 1 outside the mask."""
    # Masked before exp, so that garbage in the padding cannot become NaN in the gradient. Bounded: exp overflows
    # beyond 88, and the gradient of a token that the clip removes would be 0 x inf.
    return torch.where(mask, logprobs - base_logprobs, 0.0).clamp(-20, 20).exp()


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, value_clip: float, num_tokens: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error to the returns; all tensors [B, R].

    With `value_clip` > 0, each token counts the larger of two errors: of its value, and of its value clipped to within
    +/- value_clip of the old value. Statistic: `clipped`, tokens where the second was larger.
    """
    # Zeros outside the mask, so that garbage there cannot become NaN in the gradient.
    values, returns = torch.where(mask, values, 0.0), torch.where(mask, returns, 0.0)
    old_values = torch.where(mask, old_values, 0.0)
    error = (values - returns) ** 2
    if value_clip == 0:
        return masked_sum(error, mask) / 2 / num_tokens, {"clipped": torch.zeros_like(error).sum()}
    near = values.clamp(old_values - value_clip, old_values + value_clip)  # inside the bounds: the value itself
    near_error = (near - returns) ** 2
    with torch.no_grad():
        stats = {"clipped": masked_sum((near_error > error).float(), mask)}
    return masked_sum(torch.maximum(error, near_error), mask) / 2 / num_tokens, stats


def entropy_bonus(entropy: Tensor, mask: Tensor, *, num_tokens: int) -> Tensor:
    """Mean entropy of the sampling distribution, nats per token."""
    return masked_sum(entropy, mask) / num_tokens
