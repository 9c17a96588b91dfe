"""Reads the files of one run of a tuning, and decides when to stop the run. Runs in the driver."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from common.files import read_records
from deploy.tune.events import COMPLETE, STOPPED_BY_ASHA, STOPPED_BY_HEALTH, Events
from deploy.tune.halving import Halving
from deploy.tune.health_stop import ruined
from deploy.tune.metric import metric_of

_FILES = ("evaluations.jsonl", "metrics.jsonl")


@dataclass(frozen=True)
class Job:
    """One run: a trial with the seed of the plan (`repeat` 0), or with another one."""

    trial: int  # its number, from 1
    repeat: int = 0

    @property
    def name(self) -> str:
        return f"{self.trial:03d}" if not self.repeat else f"{self.trial:03d}-repeat-{self.repeat}"


class Listener(Protocol):
    """The part of the screen that shows new evaluations."""

    def result(self, job: Job, step: int, value: float) -> None:
        """A run has a new evaluation."""


@dataclass
class Follower:
    """Records new evaluations of a run. With `halving`, it also records when ASHA or a health rule stops the run."""

    job: Job
    directory: Path
    metric: str
    events: Events
    screen: Listener
    halving: Halving | None

    def __post_init__(self) -> None:
        self._seen: tuple[int, ...] = ()  # sizes of the files

    def read_new(self) -> bool:
        """Reads what is new. True if the run is to be stopped."""
        sizes = tuple(_size(self.directory / name) for name in _FILES)
        if sizes != self._seen:
            self._seen = sizes
            self.read_evaluations()
            self._check_health()
        return self.events.run(self.job.name).outcome is not None

    def read_evaluations(self) -> None:
        """Reads all evaluations. Once the events say that a run is complete, this also takes those after a stop."""
        for record in read_records(self.directory / _FILES[0]):
            self._take(record)

    def _take(self, record: dict[str, Any]) -> None:
        """Takes one evaluation. Evaluations after a decision to stop do not count, because their number depends on how
        fast the process stops. They count if the run reached its end nevertheless.

        ASHA gets every recorded result, also those of a complete run. A restarted command gives it all recorded
        results, and must come to the same decisions."""
        state, step = self.events.run(self.job.name), record.get("policy_version")
        value = metric_of(record, self.metric)
        if not isinstance(step, int) or step in state.results or value is None or state.outcome not in (None, COMPLETE):
            return
        self.events.result(self.job.name, step, value)
        self.screen.result(self.job, step, value)
        continues = self.halving is None or self.halving.continues(self.job.name, step, value)
        if not continues and state.outcome is None:
            self.events.stop(self.job.name, STOPPED_BY_ASHA, below(step, value))

    def _check_health(self) -> None:
        if self.halving is None or self.events.run(self.job.name).outcome is not None:
            return
        if (reason := ruined(read_records(self.directory / _FILES[1]))) is not None:
            self.events.stop(self.job.name, STOPPED_BY_HEALTH, reason)


def below(step: int, value: float) -> str:
    """Why ASHA has stopped a trial."""
    return f"{value:.4g} at step {step} is not in the best third of the trials that had reached this step"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
