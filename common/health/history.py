"""The step records that the rules look at: the first and the newest ones of a run. Runs anywhere.

Values that are missing, not numbers or not finite are skipped: a void batch has no figures of the learner, and a step
that a resumed run replayed has no waiting times.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

from common.config.ppo import Config

FIRST, NEWEST = 10, 20  # records that are kept
START = 5  # records that tell how the run began

Record = Mapping[str, Any]


class Change(NamedTuple):
    """How the mean score differs between two groups of records."""

    amount: float
    error: float  # standard error of `amount`

    @property
    def rises(self) -> bool:
        """Above zero by two standard errors, so by more than chance in 97.5 % of all cases."""
        return self.amount > 2 * self.error

    @property
    def falls(self) -> bool:
        return self.amount < -2 * self.error


class History:
    """Takes a run's records one after another."""

    def __init__(self) -> None:
        self.first: list[Record] = []
        self.newest: deque[Record] = deque(maxlen=NEWEST)

    def add(self, record: Record) -> None:
        if len(self.first) < FIRST:
            self.first.append(record)
        self.newest.append(record)

    @property
    def step(self) -> int:
        """Number of the newest step, from 0."""
        return int(number(self.newest[-1], "step") or 0)

    def compared(self, steps: int, width: int = 3) -> tuple[list[Record], list[Record]] | None:
        """The `width` records that are `steps` older than the newest ones, and the newest ones. In a short run the two
        groups are nearer to each other; None while they would overlap."""
        kept = list(self.newest)
        distance = min(steps, len(kept) - width)
        if distance < width:
            return None
        start = len(kept) - width - distance
        return kept[start : start + width], kept[-width:]

    def last(self, key: str, count: int) -> list[float]:
        """The newest values, `count` at most, the newest one last."""
        return values(self.newest, key)[-count:]

    def typical(self, key: str, count: int) -> float | None:
        """Median of the newest `count` values; None as long as there are fewer."""
        found = self.last(key, count)
        return median(found) if len(found) == count else None

    def mean(self, key: str, count: int) -> float | None:
        """Mean of the newest `count` values; None as long as there are fewer."""
        found = self.last(key, count)
        return fmean(found) if len(found) == count else None

    def at_start(self, key: str, count: int = START) -> float | None:
        """Median of the first `count` values of the run; None as long as there are fewer."""
        found = values(self.first, key)[:count]
        return median(found) if len(found) == count else None


def number(record: Record, key: str) -> float | None:
    """The value, if it is a finite number."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def values(records: Iterable[Record], key: str) -> list[float]:
    """The values of all records that have one."""
    return [value for record in records if (value := number(record, key)) is not None]


def step_kl(history: History, cfg: Config, count: int) -> list[float]:
    """How far each of the newest steps moved the policy, nats per token. With "mask", `ppo/approx_kl` is the distance
    from the sampler, so the distance before the step (`mismatch/kl`) is subtracted."""
    if not cfg.ppo.ratio_to_sampler:
        return history.last("ppo/approx_kl", count)
    pairs = ((number(record, "ppo/approx_kl"), number(record, "mismatch/kl")) for record in history.newest)
    return [max(0.0, kl - before) for kl, before in pairs if kl is not None and before is not None][-count:]


def score_change(before: Sequence[Record], after: Sequence[Record], rollouts: int) -> Change | None:
    """The change of the mean score between two groups of records, each of which has `rollouts` scores. None if one of
    the groups has no scores."""
    means, variances = [], []
    for records in (before, after):
        scored, spreads = values(records, "rollout/score/mean"), values(records, "rollout/score/std")
        if not scored or not spreads:
            return None
        means.append(fmean(scored))
        variances.append(fmean(spread**2 for spread in spreads) / (rollouts * len(scored)))
    return Change(means[1] - means[0], math.sqrt(sum(variances)))
