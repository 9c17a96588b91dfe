"""The targets of an update: the numbers that stay fixed during its passes over a batch.

Runs in every learner rank. Each rank computes them in full from the whole batch, so whitening is over the whole batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from common.config.ppo import PPOConfig
from common.model.masking import masked_mean, masked_sum, masked_var, var_above_rounding, whiten
from common.model.transfer import on_device
from learner.ppo.advantages import ADVANTAGES, Lambda, length_lambdas, returns_to_go
from learner.ppo.critic_quality import critic_quality
from learner.ppo.experience import ExperienceBatch
from learner.ppo.mismatch import importance_weights
from learner.ppo.shaping import KL_ESTIMATORS, token_rewards


@dataclass(frozen=True)
class Targets:
    """All [B, R]; zeros outside the mask."""

    mask: Tensor
    base_logprobs: Tensor  # what the ratio divides by: of the policy before the update, or of the sampler
    old_values: Tensor  # zeros without a critic
    advantages: Tensor
    returns: Tensor
    importance: Tensor  # weights that correct for the sampler, see `importance_weights`; 1 without a correction

    def rows(self, rows: Tensor, width: int, device: torch.device) -> Targets:
        """The given rows, cut to `width` tokens, on the device."""
        return Targets(*(on_device(getattr(self, field.name)[rows, :width], device) for field in fields(self)))


class Derivation(NamedTuple):
    """Intermediate results of the targets, [B, R]. The update ignores them; learner/ppo/credit.py writes them down."""

    kl: Tensor
    rewards: Tensor
    advantages: Tensor  # before whitening
    ends: Tensor  # bool, see ExperienceBatch


def targets(
    batch: ExperienceBatch,
    old_logprobs: Tensor | None,
    old_values: Tensor,
    scores: Tensor,
    *,
    kl_coef: float,
    kl_estimator: str,
    ppo: PPOConfig,
    turn_rewards: Tensor | None = None,
) -> tuple[Targets, Derivation, dict[str, float]]:
    """The targets, their intermediate results, and statistics over the batch by metric key.

    old_logprobs, old_values [B, R]: of the policy and the critic before the update. old_logprobs is None if the ratio
    divides by `rollout_logprobs`; values are zeros without a critic. scores [B]: after normalisation, float32.
    turn_rewards [B, R]: parts of the scores that an environment gave for turns, see `token_rewards`.
    """
    mask = batch.mask
    base_logprobs = batch.rollout_logprobs if old_logprobs is None else old_logprobs
    ref_logprobs = torch.where(batch.ref_is_policy[:, None], base_logprobs, batch.ref_logprobs)
    kl = KL_ESTIMATORS[kl_estimator](base_logprobs, ref_logprobs)
    rewards = token_rewards(scores, kl, mask, kl_coef=kl_coef, turn_rewards=turn_rewards, ends=batch.ends)
    advantages, returns = advantages_and_returns(rewards, old_values, batch, ppo)
    importance, mismatch = importance_weights(
        base_logprobs, batch.rollout_logprobs, mask, cap=ppo.importance_cap or math.inf
    )
    fixed = Targets(
        mask,
        base_logprobs,
        old_values,
        whiten(advantages, mask) if ppo.whiten_advantages else advantages,
        returns,
        importance if ppo.importance_cap and old_logprobs is not None else torch.ones_like(importance),
    )
    num_tokens, kl_sum = max(1, int(mask.sum())), float(masked_sum(kl, mask))
    stats = {
        "kl/coef": kl_coef,
        "kl/per_token": kl_sum / num_tokens,
        "kl/per_response": kl_sum / len(mask),
    }
    if old_logprobs is not None:  # else the first minibatch measures it
        stats["mismatch/kl"] = mismatch["mismatch_kl"].item() / num_tokens
        stats["mismatch/capped"] = mismatch["capped"].item() / num_tokens
    if ppo.has_critic:
        _, realised = returns_to_go(rewards.double(), old_values, mask, gamma=ppo.gamma, ends=batch.ends)
        stats |= _value_statistics(old_values, returns, advantages, mask)
        stats |= critic_quality(old_values, realised, scores, mask)
    return fixed, Derivation(kl, rewards, advantages, batch.ends), stats


def advantages_and_returns(
    rewards: Tensor, values: Tensor, batch: ExperienceBatch, ppo: PPOConfig
) -> tuple[Tensor, Tensor]:
    """Advantages and returns by the configured estimator, [B, R], before whitening. rewards, values: [B, R]."""
    return ADVANTAGES[ppo.advantages](
        rewards,
        values,
        batch.mask,
        groups=batch.groups,
        gamma=ppo.gamma,
        lam=_lambda(ppo.lam, batch, ppo),
        value_lam=None if ppo.value_lam in (None, ppo.lam) else _lambda(ppo.value_lam, batch, ppo),
        ends=batch.ends,
    )


def _lambda(setting: float | Literal["length"], batch: ExperienceBatch, ppo: PPOConfig) -> Lambda:
    """One lambda for all, or one for each token by the length of its sequence, [B, R]."""
    return length_lambdas(batch.mask, batch.ends, alpha=ppo.lam_alpha) if setting == "length" else setting


def _value_statistics(values: Tensor, returns: Tensor, advantages: Tensor, mask: Tensor) -> dict[str, float]:
    """How well the critic predicts its targets."""
    returns_var, advantages_var = var_above_rounding(returns, mask), float(masked_var(advantages, mask))
    unexplained = float(masked_var(returns - values, mask))
    return {
        "value/mean": float(masked_mean(values, mask)),
        "value/returns_var": returns_var,
        "value/advantages_var": advantages_var,
        "value/variance_ratio": advantages_var / returns_var if returns_var else 0.0,
        "value/explained_variance": 1 - unexplained / returns_var if returns_var else 0.0,
    }
