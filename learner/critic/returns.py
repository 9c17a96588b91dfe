"""The targets of a critic: the realised returns of responses in a journal, as a pure function.

Runs in the driver and in every trainer rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.config.actors import RewardConfig
from common.config.ppo import KLConfig
from learner.ppo.advantages import returns_to_go
from learner.ppo.experience import ExperienceBatch
from learner.ppo.scores import RunningMoments, shaped, shaped_turns
from learner.ppo.shaping import KL_ESTIMATORS, token_rewards


def realised_returns(
    batch: ExperienceBatch, moments: RunningMoments, *, reward: RewardConfig, kl: KLConfig, gamma: float
) -> tuple[Tensor, Tensor]:
    """Scores [B] as a learner sees them, and Monte-Carlo returns [B, R], float32; zeros outside the mask.

    The KL penalty of a response is computed from `rollout_logprobs`, because the journal does not have the learner's
    old_logprobs. Rollouts without `ref_logprobs` were sampled from the reference itself, so their penalty is 0.
    `moments` normalise the scores.
    """
    scores = shaped(batch.scores, moments, reward)
    ref_logprobs = torch.where(batch.ref_is_policy[:, None], batch.rollout_logprobs, batch.ref_logprobs)
    penalty = KL_ESTIMATORS[kl.estimator](batch.rollout_logprobs, ref_logprobs)
    turns = shaped_turns(batch.turn_rewards, moments, reward)
    rewards = token_rewards(scores, penalty, batch.mask, kl_coef=kl.coef, turn_rewards=turns, ends=batch.ends)
    _, returns = returns_to_go(rewards, rewards, batch.mask, gamma=gamma, ends=batch.ends)
    return scores, returns
