"""Health rules about the machinery: length limit, engines, importance weights, idle roles, lost
prefixes, voids. Runs anywhere.

Each function takes the history and the config, and says in one sentence what it sees, or returns None.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import fmean, median

from common.config.actors import GeneratorsConfig
from common.config.ppo import Config
from common.health.history import History, Record, number, step_kl

# Share of the way from the length at the start to the limit, and share of the responses that are cut off in addition to
# those at the start. Responses that are as long as the limit from the start are no drift: the human-feedback demo cuts
# its answers at 24 tokens.
LONGER, MORE_CUT_OFF = 0.5, 0.1
# k3 in nats per token. Rounding to bfloat16 explains 0.003 (the demo's first steps).
MISMATCH = 0.01
# KL at the end of a step, over the step's mean KL. KL grows with the square of the distance, so a step that moves the
# policy evenly ends at 3 times its mean, and n such steps in one direction reach n * n times as much. The bound is
# twice that, because few tokens with large differences decide the mean: a tiny run with max_staleness = 1 has 1 to 4
# times its mean KL, and 7 in single steps.
END_OF_STEP = 6.0
# Share of the tokens. Rounding alone caps none: it makes ratios of 1.4 (docs/ppo.md). Policies that are one fast step
# old cap 1 to 3 % (the tiny run with max_staleness = 1).
CAPPED = 0.05
IDLE = 2 / 3  # share of a step: the role waits twice as long as it works
ENVIRONMENTS = 1 / 3  # share of a step: without this wait, steps would take two thirds of their time
# Tokens that engines compute again, for each token that they sample. On a CPU, sampling a token takes 12 times as long
# as computing one again: docs/performance.md has 61 s for 8,192 sampled tokens, and 37 s more with about 63,000
# computed again. So this bound makes engines a sixth slower (2 / 12). The learner must also wait for rollouts, because
# otherwise slower engines cost nothing.
RECOMPUTED, LEARNER_WAITS = 2.0, 0.2
WORTH_IT_S = 1.0  # seconds of a step below which a wait is not worth a change
VOIDS = 0.05  # share of the rollouts that are void


def length_at_limit(history: History, cfg: Config) -> str | None:
    """Responses get longer until the limit cuts them off."""
    limit = cfg.max_response_tokens
    newest, first = _lengths(history.newest)[-3:], _lengths(history.first)[:3]
    tokens, tokens_before = (median(lengths) if len(lengths) == 3 else None for lengths in (newest, first))
    finished, finished_before = history.typical("rollout/finished", 3), history.at_start("rollout/finished", 3)
    if tokens is None or tokens_before is None or finished is None or finished_before is None:
        return None
    if tokens - tokens_before < LONGER * (limit - tokens_before) or finished_before - finished < MORE_CUT_OFF:
        return None
    what, counted = ("responses", "") if cfg.environment is None else ("episodes", " with those of the environment")
    return (
        f"{what} grew from {tokens_before:.0f} to {tokens:.0f} tokens{counted}, and {1 - finished:.0%} are cut off at "
        f"{cfg.max_response_setting} ({limit})"
    )


def _lengths(records: Iterable[Record]) -> list[float]:
    """The mean length of the responses of each record, tokens. In an episode, the environment's tokens count too, as
    they do for the limit."""
    found = ((number(record, "rollout/response_tokens/mean"), record) for record in records)
    return [sampled + (number(record, "environment/tokens") or 0.0) for sampled, record in found if sampled is not None]


def engine_mismatch(history: History, cfg: Config) -> str | None:
    """Engines and learner disagree by more than rounding and older weights explain."""
    found, moves = history.typical("mismatch/kl", 5), step_kl(history, cfg, 5)
    moved = fmean(moves) if len(moves) == 5 else 0.0
    staleness = history.typical("staleness/max", 5) or 0.0
    if staleness and cfg.ppo.ppo_epochs * cfg.ppo.minibatches == 1:
        return None  # the only pass of a step measures no move, so the bound is unknown
    bound = MISMATCH + END_OF_STEP * moved * staleness**2
    if found is None or found <= bound:
        return None
    return f"engines and learner differ by {found:.2g} nats per token; rounding and older weights explain {bound:.2g}"


def importance_capped(history: History, cfg: Config) -> str | None:
    share = history.typical("mismatch/capped", 5)
    if share is None or share <= CAPPED:
        return None
    return (
        f"{share:.0%} of the tokens have an importance weight above ppo.importance_cap ({cfg.ppo.importance_cap:g}): "
        "the correction no longer holds for them"
    )


def learner_starving(history: History, cfg: Config) -> str | None:
    """With max_staleness = 0 the roles take turns, so waiting is no fault there. More generators would not help where
    all of them wait for environments."""
    if environments_slow(history, cfg) is not None:
        return None
    idle = _idle(history, "wait/learner_s") if cfg.max_staleness else None
    return f"the learner waits for rollouts {idle:.0%} of the time" if idle is not None else None


def generators_starving(history: History, cfg: Config) -> str | None:
    """With max_staleness = 0 the roles take turns, so waiting is no fault there."""
    idle = _idle(history, "wait/generators_s") if cfg.max_staleness else None
    if idle is None:
        return None
    return (
        f"{idle:.0%} of the time no training rollout is written or scored (the time of held-out evaluations counts too)"
    )


def environments_slow(history: History, cfg: Config) -> str | None:
    """Engines and learner wait for environments. While the learner has work, such a wait costs nothing."""
    idle = _idle(history, "wait/environments_s", "wait/learner_s", most=ENVIRONMENTS)
    if idle is None:
        return None
    return f"{idle:.0%} of the time no generator writes and the learner has no rollouts, because environments answer"


def prefixes_lost(history: History, cfg: Config) -> str | None:
    """Engines compute the earlier turns of episodes again, and the learner waits for it."""
    recomputed = history.typical("environment/recomputed", 5)
    sampled = history.typical("rollout/response_tokens/mean", 5)
    context = history.typical("environment/context_tokens", 5)
    if cfg.environment is None or recomputed is None or sampled is None or context is None:
        return None
    if recomputed == 0 or recomputed < RECOMPUTED * sampled:
        return None
    if environments_slow(history, cfg) or _idle(history, "wait/learner_s", most=LEARNER_WAITS) is None:
        return None
    outstanding = cfg.rollouts_per_step * (cfg.max_staleness + 1)
    at_once = min(outstanding, cfg.environment.concurrent * cfg.environment.max_replicas)
    episodes = math.ceil(at_once / cfg.generators.min)
    return (
        f"engines compute {recomputed:.0f} tokens of each episode again, {recomputed / max(1.0, sampled):.1f} for each "
        "token that they sample, because KV caches lose episodes before their next turn, or turns move to other "
        f"generators; each generator should hold up to {episodes} episodes of {context:.0f} tokens at once, "
        f"{episodes * context:.0f} tokens, which depends on {_cache_settings(cfg.generators)}"
    )


def _cache_settings(engines: GeneratorsConfig) -> str:
    """What to raise so that the episodes of each generator fit its KV cache."""
    if engines.kv_cache_mib is not None:
        return f"generators.kv_cache_mib ({engines.kv_cache_mib})"
    if engines.gpus < 1:
        return f"generators.gpus ({engines.gpus:g})"
    # An engine has whole GPUs: more of them go to other generators, or to more parts of its weights.
    return f"generators.min ({engines.min}) and generators.tensor_parallel ({engines.tensor_parallel})"


def voids_rising(history: History, cfg: Config) -> str | None:
    """Rollouts are lost that were not lost before, and not in one burst."""
    voids = history.last("rollout/voids", len(history.newest))
    newest, before = voids[-5:], voids[:-5]
    if len(newest) < 5 or median(newest) == 0:
        return None
    share, share_before = _void_share(newest, cfg), _void_share(before, cfg)
    if share < VOIDS or share < 2 * share_before:
        return None
    if not before:
        return f"{share:.0%} of the rollouts of the first 5 steps are void"
    return f"{share:.0%} of the rollouts of 5 steps are void, {share_before:.0%} were before"


def _idle(history: History, *keys: str, most: float = IDLE) -> float | None:
    """The typical share of a step that a role waits, if it is more than `most`. With several waits, the shortest
    counts."""
    shares, waits = [], []
    for record in list(history.newest)[-5:]:
        parts = [number(record, f"{name}_s") for name in ("wait/learner", "time/journal", "time/learn", "time/publish")]
        known = [part for part in parts if part is not None]
        found = [wait for key in keys if (wait := number(record, key)) is not None]
        if len(found) == len(keys) and len(known) == len(parts) and sum(known) > 0:
            shares.append(min(1.0, min(found) / sum(known)))
            waits.append(min(found))
    if len(shares) < 5 or median(shares) <= most or median(waits) < WORTH_IT_S:
        return None
    return median(shares)


def _void_share(voids: list[float], cfg: Config) -> float:
    return sum(voids) / (sum(voids) + cfg.rollouts_per_step * len(voids)) if voids else 0.0
