"""Health rules about the policy: KL, entropy, size of a step. Runs anywhere.

Each function takes the history and the config, and says in one sentence what it sees, or returns None.
"""

from __future__ import annotations

from statistics import median

from common.config.ppo import Config
from common.health.history import START, History, score_change, step_kl, values

# TRL's PPOTrainer warns below -1 nat per response. A few tenths below 0 are noise of the k1 estimator.
NEGATIVE_KL = -1.0
# Nats per response. TRL's training FAQ wants a KL between 0 and 10. A doubling below it is how every run begins: the
# demo goes from 0 to 2 nats within three steps.
FAR_KL = 10.0
KL_SPAN = 10  # a KL that doubles within this many steps explodes
# Nats per response, and steps. A policy that learns is farther away: the demos are at 2.0 and 0.3 after two steps.
PINNED_KL, PINNED_STEPS = 0.01, 30
# Share of the entropy at the start. Low entropy alone is no fault: training trades entropy for score (Cui et al. 2025,
# arXiv:2505.22617, fit score = b - a * exp(entropy)). The demo ends with 6 % of its entropy and 98 % right.
LOW_ENTROPY = 0.2
STILL_VARIED = 0.8  # share of the scores' spread at the start; above it, about as much is left to learn as then
GAIN_SPAN = 17  # steps without a gain in score; with a compared group of 3 records, all NEWEST records
# Share of tokens. Runs that learn fast and well have 0.32 in three steps in a row (the demo's task with clip_eps 0.05
# and two epochs), and 0.45 in one step (a tiny model with learning rate 4e-3). Above a half, the clip stops most of
# what a step tries to do.
HIGH_CLIP_FRAC = 0.5
# Nats per token. "The 37 Implementation Details of PPO" (Huang et al. 2022) finds that it usually stays below 0.02, as
# much as a token has at the edge of clip_eps 0.2. In language models few tokens that change much decide the mean: runs
# that learn well reach 0.04 in one step (the demo) and 0.08 in three (the tiny model). At 4, 12 and 37 times its
# learning rate the tiny model has 0.22 and still learns; 0.58 and keeps 1 % of its entropy; 6.3 and unlearns all.
HIGH_APPROX_KL = 0.2
OVER_TARGET = 1.5  # times ppo.target_kl: where Spinning Up and Stable-Baselines3 end a step


def kl_negative(history: History, cfg: Config) -> str | None:
    """The mean of log(old / ref) over the sampler's tokens is KL(sampler, ref) - KL(sampler, old). `mismatch/kl`
    measures the second one. So a number farther below zero cannot be the KL of two distributions."""
    kl, mismatch, tokens = (
        history.mean(key, 3) for key in ("kl/per_response", "mismatch/kl", "rollout/response_tokens/mean")
    )
    if kl is None or cfg.kl.estimator != "k1":  # k2 and k3 are never below 0
        return None
    # With "mask" the first term is KL(sampler, ref) itself.
    lowest = NEGATIVE_KL - (0.0 if cfg.ppo.ratio_to_sampler else (mismatch or 0.0) * (tokens or 0.0))
    if kl >= lowest:
        return None
    return f"KL from the reference is {kl:.2f} nats per response; noise explains no less than {lowest:.2f}"


def kl_exploding(history: History, cfg: Config) -> str | None:
    """The KL grows fast, and the score gains less than the penalty costs."""
    groups = history.compared(KL_SPAN)
    if groups is None:
        return None
    kls = [values(records, "kl/per_response") for records in groups]
    change = score_change(*groups, cfg.rollouts_per_step)
    if not all(kls) or change is None:
        return None
    before, now = map(median, kls)
    span = min(KL_SPAN, len(history.newest) - len(groups[1]))
    cost = (history.typical("kl/coef", 1) or 0.0) * (now - before)
    gain = change.amount / (score_unit(history, cfg) or 1.0)
    if now < FAR_KL or now < 2 * before or gain > cost:
        return None
    return (
        f"KL from the reference went from {before:.1f} to {now:.1f} nats per response in {span} steps; the penalty "
        f"rose by {cost:.2g}, the score by {gain:.2g}"
    )


def kl_pinned(history: History, cfg: Config) -> str | None:
    """The policy has not moved from its start by more than rounding explains."""
    trained = history.step + 1 - max(cfg.critic_warmup_steps, cfg.optimizer.warmup_steps)
    kl = history.typical("kl/per_response", 5)
    change = score_change(history.first[:START], list(history.newest)[-START:], cfg.rollouts_per_step)
    if kl is None or change is None or trained < PINNED_STEPS or change.rises:
        return None
    rounding = (history.typical("mismatch/kl", 5) or 0.0) * (history.typical("rollout/response_tokens/mean", 5) or 0.0)
    if abs(kl) > max(PINNED_KL, rounding):
        return None
    return f"KL from the reference is {kl:.2g} nats per response after {trained} steps, and the score has not risen"


def entropy_collapsing(history: History, cfg: Config) -> str | None:
    """Entropy fell without a gain in score: as much is left to learn as before, or the score even fell."""
    before, now = history.at_start("ppo/entropy", 3), history.typical("ppo/entropy", 3)
    spread, spread_now = history.at_start("rollout/score/std"), history.typical("rollout/score/std", 3)
    groups = history.compared(GAIN_SPAN)
    if before is None or now is None or spread is None or spread_now is None or groups is None:
        return None
    lately = score_change(*groups, cfg.rollouts_per_step)
    over_all = score_change(history.first[:3], groups[1], cfg.rollouts_per_step)
    if now > LOW_ENTROPY * before or lately is None or over_all is None or lately.rises:
        return None
    if not (over_all.falls or spread_now >= STILL_VARIED * spread):
        return None
    return (
        f"entropy fell from {before:.2f} to {now:.2g} nats per token while the score changed by {over_all.amount:+.2g}"
    )


def clip_frac_high(history: History, cfg: Config) -> str | None:
    key, rule = ("ppo/masked", "mask") if cfg.ppo.ratio_to_sampler else ("ppo/clip_frac", "clip")
    share = history.typical(key, 3)
    if share is None or share <= HIGH_CLIP_FRAC:
        return None
    return f"the {rule} removed the gradient of {share:.0%} of the tokens (ppo.clip_eps is {cfg.ppo.clip_eps:g})"


def approx_kl_high(history: History, cfg: Config) -> str | None:
    moved, bound = step_kl(history, cfg, 3), max(HIGH_APPROX_KL, OVER_TARGET * cfg.ppo.target_kl)
    if len(moved) < 3 or (kl := median(moved)) <= bound:
        return None
    return f"a step moves the policy by {kl:.2g} nats per token, more than {bound:.2g}"


def score_unit(history: History, cfg: Config) -> float | None:
    """The unit of the scores that the learner gets, in reward units: 1, or their running standard deviation."""
    return 1.0 if cfg.reward.normalise == "none" else history.typical("reward/running_std", 1)
