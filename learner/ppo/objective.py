"""The loss of PPO on one micro-batch: its three terms put together, and their statistics.

Runs in every learner rank.
"""

from __future__ import annotations

from torch import Tensor

from common.config.ppo import PPOConfig
from learner.ppo.losses import POLICY_LOSSES, entropy_bonus, policy_loss, value_loss
from learner.ppo.targets import Targets

DROPPED = {"clip": "ppo/clip_frac", "mask": "ppo/masked"}  # the metric of tokens without a gradient, by ppo.policy_loss


def objective(
    logprobs: Tensor,
    entropy: Tensor,
    values: Tensor | None,
    fixed: Targets,
    *,
    ppo: PPOConfig,
    num_tokens: int,
    critic_only: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """policy loss + value_coef * value loss - entropy_coef * entropy, and sums over tokens by metric key, float64 and
    on the device: reading them would wait for the GPU.

    The tensors are [B, R]. Without a critic `values` is None. `num_tokens` counts the whole minibatch over all ranks.
    With `critic_only` the loss is that of the critic alone.
    """
    terms = []
    bonus = entropy_bonus(entropy, fixed.mask, num_tokens=num_tokens)
    p_loss, p_stats = policy_term(logprobs, fixed, ppo=ppo, num_tokens=num_tokens)
    stats = {
        "ppo/policy_loss": p_loss.double() * num_tokens,
        "ppo/entropy": bonus.double() * num_tokens,
        DROPPED[ppo.policy_loss]: p_stats["dropped"],
        "ppo/approx_kl": p_stats["approx_kl"],
        "ppo/ratio": p_stats["ratio"],
    }
    if values is not None:
        v_loss, v_stats = value_loss(
            values, fixed.old_values, fixed.returns, fixed.mask, value_clip=ppo.value_clip, num_tokens=num_tokens
        )
        stats |= {"value/loss": v_loss.double() * num_tokens, "value/clip_frac": v_stats["clipped"]}
        terms.append(ppo.value_coef * v_loss)
    if not critic_only:
        terms.append(p_loss)
        if ppo.entropy_coef:
            terms.append(-ppo.entropy_coef * bonus)
    return sum(terms[1:], terms[0]), {key: total.detach().double() for key, total in stats.items()}


def policy_term(
    logprobs: Tensor, fixed: Targets, *, ppo: PPOConfig, num_tokens: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy loss by the rule and the bounds of the config, and its sums over tokens."""
    return policy_loss(
        logprobs,
        fixed.base_logprobs,
        fixed.advantages,
        fixed.mask,
        rule=POLICY_LOSSES[ppo.policy_loss],
        bounds=ppo.ratio_bounds,
        num_tokens=num_tokens,
        weights=fixed.importance,
    )
