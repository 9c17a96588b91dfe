"""The learner's log-probabilities against those of the sampler, and the weights that correct for the difference.

Runs in every learner rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.model.masking import masked_sum
from learner.ppo.shaping import k3


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
