"""The three terms of PPO's objective (Schulman et al. 2017, arXiv:1707.06347, eq. 9), as pure functions.

Runs in every learner rank. Every loss is a sum over the True places of the mask divided by `num_tokens`, the token
count of the whole minibatch over all ranks. So neither micro-batches nor ranks can change the gradient. Each also
returns statistics, detached, as sums over tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.model.masking import masked_sum
from learner.ppo.shaping import k3


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_eps: float,
    num_tokens: int,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate: mean of max(-A ratio, -A clip(ratio, 1 - eps, 1 + eps)); all tensors [B, R].

    `weights` are per-token importance weights of the sampler (see `importance_weights`). Statistics: `clipped`, tokens
    whose gradient the clip removed; `approx_kl`, k3 estimate of KL(old || new) in nats; `ratio`.
    """
    ratio = probability_ratio(logprobs, old_logprobs, mask)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_eps, 1 + clip_eps)
    per_token = torch.maximum(unclipped, clipped)
    if weights is not None:
        per_token = per_token * weights
    with torch.no_grad():
        stats = {
            "clipped": masked_sum((clipped > unclipped).float(), mask),
            "approx_kl": masked_sum(k3(torch.where(mask, old_logprobs, 0.0), torch.where(mask, logprobs, 0.0)), mask),
            "ratio": masked_sum(ratio, mask),
        }
    return masked_sum(per_token, mask) / num_tokens, stats


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """exp(logprobs - old_logprobs), [B, R], 1 outside the mask."""
    # Masked before exp, so that garbage in the padding cannot become NaN in the gradient. Bounded: exp overflows
    # beyond 88, and the gradient of a token that the clip removes would be 0 x inf.
    return torch.where(mask, logprobs - old_logprobs, 0.0).clamp(-20, 20).exp()


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, value_clip: float, num_tokens: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error to the returns; all tensors [B, R].

    With `value_clip` > 0 it is the larger of two errors: that of the value, and that of the value kept within
    +/- value_clip of its old one. Statistic: `clipped`, tokens where the second was larger.
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


@torch.no_grad()
def importance_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, cap: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Truncated weights min(pi_old / pi_rollout, cap), [B, R], 1 outside the mask; they carry no gradient.

    They correct for tokens that older weights sampled, or an engine that rounds differently (decoupled PPO, Hilton et
    al. 2021, arXiv:2110.00641; truncation, Ionides 2008). Statistics: `capped` tokens; `mismatch_kl`, k3 in nats.
    """
    difference = torch.where(mask, old_logprobs - rollout_logprobs, 0.0).clamp(-20, 20)
    weights = difference.exp()
    stats = {
        "capped": masked_sum((weights > cap).float(), mask),
        "mismatch_kl": masked_sum(k3(torch.zeros_like(difference), difference), mask),
    }
    return torch.where(mask, weights.clamp(max=cap), 1.0), stats
