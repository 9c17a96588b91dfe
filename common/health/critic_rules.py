"""Health rules about the critic: does it predict what the responses really earn? Runs anywhere.

Each function takes the history and the config, and says in one sentence what it sees, or returns None. All look at
realised returns. Value targets with a lambda below 1 contain the critic's own predictions, so a critic can agree with
them and still know nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from common.config.ppo import Config
from common.health.history import History, Record, number

# Steps that train the critic before it is judged, and then steps that judge it. Its head starts at zero.
CRITIC_STEPS = 10
VARIANCE = "value/returns_var/realised"
EXPLAINED = "value/explained_variance/"
# The rules judge the critic while the returns have at least this share of their variance at the start. With less, the
# variance is mostly chance: once 97 % of the demo's answers are right, 19 % of the variance is left, and no critic can
# know which answers will be wrong.
ENOUGH_VARIANCE = 0.5
# Below this share, the report draws the figures of a step in grey. It is lower than the rules' bound, because a reader
# also sees the variance.
LITTLE_VARIANCE = 0.25
USELESS = 0.01  # share that is explained; a head that hardly learns is at 0.0001 in some steps
# If prompts say nothing about the score, a good critic gives all first tokens the same value, which explains 0. Values
# that explain -10 % vary at random, and their variance is added to that of the advantages.
LATE = -0.1
# A share of the returns' standard deviation, in addition to what chance explains. Beyond it, an advantage is mostly the
# critic's error.
MISCALIBRATED = 0.5


def critic_useless(history: History, cfg: Config) -> str | None:
    """The critic explains almost nothing. Steps are weighted with their variance, because the figure of a step with
    hardly any variance means nothing."""
    steps = _judging(history, cfg)
    explained = _mean(steps, EXPLAINED + "realised")
    if explained is None or explained > USELESS:
        return None
    return f"the critic explains {explained:.0%} of the variance of the realised returns after {history.step + 1} steps"


def critic_late(history: History, cfg: Config) -> str | None:
    """The critic predicts well once it has read most of a response, but adds noise to the advantages of the first
    tokens."""
    steps = _judging(history, cfg)
    explained, first = _mean(steps, EXPLAINED + "realised"), _mean(steps, EXPLAINED + "first")
    if explained is None or first is None or explained <= USELESS or first > LATE:
        return None
    return (
        f"the critic explains {explained:.0%} of the realised returns' variance over all tokens, but {first:.0%} at "
        "the first tokens, where a constant would explain 0%"
    )


def critic_miscalibrated(history: History, cfg: Config) -> str | None:
    """Predicted and realised returns are far apart. The critic may still explain much of the variance."""
    steps = _judging(history, cfg)
    error, variance = _mean(steps, "value/calibration_error"), _mean(steps, VARIANCE)
    if error is None or variance is None:
        return None
    # A bin has a tenth of the tokens: at worst, all those of a tenth of the responses. The mean return of so few
    # differs from its expectation by this much on average.
    chance = math.sqrt(2 / math.pi * 10 / cfg.rollouts_per_step)
    deviation = math.sqrt(variance)
    if error <= (MISCALIBRATED + chance) * deviation:
        return None
    return (
        f"predicted and realised returns differ by {error:.2g} on average (calibration in ten bins); the returns' "
        f"standard deviation is {deviation:.2g}, and chance explains {chance * deviation:.2g}"
    )


def _judging(history: History, cfg: Config) -> list[Record]:
    """The newest CRITIC_STEPS records with figures of the critic (a void batch has none). Empty while there are fewer
    after the critic's first steps, and once little variance is left: the share that is explained then proves
    nothing."""
    first = cfg.critic_warmup_steps + CRITIC_STEPS
    known = [record for record in history.newest if number(record, VARIANCE) is not None]
    judging = [record for record in known if (number(record, "step") or 0) >= first][-CRITIC_STEPS:]
    at_start = history.at_start(VARIANCE)
    if len(judging) < CRITIC_STEPS or at_start is None:
        return []
    variance = fmean(_variance(record) for record in judging)
    return judging if variance > 0 and variance >= ENOUGH_VARIANCE * at_start else []


def _mean(steps: Sequence[Record], key: str) -> float | None:
    """Mean of the values, each weighted with the variance of its step; None if a step has no value."""
    values = [number(record, key) for record in steps]
    total = sum(map(_variance, steps))
    found = [_variance(record) * value for record, value in zip(steps, values, strict=True) if value is not None]
    return sum(found) / total if found and len(found) == len(steps) else None


def _variance(record: Record) -> float:
    return number(record, VARIANCE) or 0.0
