"""The order of the runs of a tuning: all trials first, then the finalists with further seeds. Runs in the driver."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from common.errors import UserError
from common.files import read_records
from deploy.restarts import driver_command
from deploy.tune.events import COMPLETE, CUT, FAILED, STOPPED_BY_ASHA, STOPPED_BY_HEALTH, Events, RunState
from deploy.tune.halving import Halving
from deploy.tune.health_stop import ruined
from deploy.tune.plan import Plan
from deploy.tune.space import as_overrides
from deploy.tune.trial_process import POLL_S, Command, TrialProcess, evaluations, metric_of

_LONGEST_LABEL = 60  # characters of the settings in the name of a run directory


@dataclass(frozen=True)
class Job:
    """One run: a trial with the seed of the plan (`repeat` 0), or with another one."""

    trial: int  # its number, from 1
    repeat: int = 0

    @property
    def name(self) -> str:
        return f"{self.trial:03d}" if not self.repeat else f"{self.trial:03d}-repeat-{self.repeat}"


class Watcher(Protocol):
    """What the screen is told."""

    def started(self, job: Job, *, continues: bool) -> None:
        """A run begins or continues."""

    def result(self, job: Job, step: int, value: float) -> None:
        """A run has a new evaluation."""

    def ended(self, job: Job, state: RunState) -> None:
        """A run has ended."""

    def progress(self, done: int, total: int, left_s: float | None) -> None:
        """This many runs have ended, of those that the tuning may need."""


@dataclass
class Search:
    """A tuning in `directory`."""

    plan: Plan
    directory: Path
    events: Events
    watcher: Watcher
    hours: float  # of all starts of the command together
    at_once: int = 1
    grace_s: float = 0.0  # see TrialProcess
    command: Command = driver_command
    poll_s: float = POLL_S

    def __post_init__(self) -> None:
        self.trials = [Job(number) for number in range(1, len(self.plan.trials) + 1)]
        self._running: set[str] = set()

    async def run(self) -> None:
        """Runs everything that is missing, as far as the time allows."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, self.hours * 3600 - self.events.seconds)):
                halving = self._halving()
                await self._all(self.waiting_trials, halving, reserve=True)
                await self._all(self.waiting_repeats)

    def directory_of(self, job: Job) -> Path:
        """The run directory of a job, such as DIR/trials/003-clip_eps-0.1."""
        label = "-".join(f"{key.rpartition('.')[2]}-{value}" for key, value in self.plan.trials[job.trial - 1].items())
        label = re.sub(r"[^\w.-]+", "_", label)[:_LONGEST_LABEL].rstrip("-._")
        return self.directory / "trials" / (f"{job.name}-{label}" if not job.repeat else job.name)

    def finalists(self) -> list[Job]:
        """The best trials: complete ones first, then those that came farthest. At equal steps the value decides."""

        def rank(job: Job) -> tuple[bool, tuple[int, float]]:
            state = self.events.run(job.name)
            return state.outcome == COMPLETE or state.again, state.last or (-1, 0.0)

        able = [job for job in self.trials if _able(self.events.run(job.name))]
        return sorted(able, key=rank, reverse=True)[: self.plan.finalists]

    def waiting_trials(self) -> list[Job]:
        """Trials that have not ended."""
        return [job for job in self.trials if (state := self.events.run(job.name)).outcome is None and not state.again]

    def waiting_repeats(self) -> list[Job]:
        """Runs of the finalists that are missing: seed by seed, so that an early end leaves equal numbers of seeds. A
        finalist that ASHA has stopped continues to its end."""
        jobs = [Job(job.trial, repeat) for repeat in range(self.plan.seeds) for job in self.finalists()]
        return [job for job in jobs if self.events.run(job.name).outcome in (None, STOPPED_BY_ASHA)]

    def _halving(self) -> Halving:
        """ASHA with all results so far. Writes down stops that a killed start of the command had decided."""
        halving = self.events.halving(self.plan.rungs, {job.name for job in self.trials})
        for job in self.trials:
            state = self.events.run(job.name)
            if job.name in halving.stopped and state.outcome is None and not state.again:
                self.events.stop(job.name, STOPPED_BY_ASHA, below(*(state.last or (0, 0.0))))
        return halving

    async def _all(
        self, waiting: Callable[[], list[Job]], halving: Halving | None = None, *, reserve: bool = False
    ) -> None:
        """Runs the waiting jobs, `at_once` of them at the same time, until none is left or the next one would not end
        in time. With `reserve` the time of the finalists' further seeds is kept free."""

        async def work() -> None:
            while self._time_for(reserve) and (jobs := [job for job in waiting() if job.name not in self._running]):
                self._running.add(jobs[0].name)
                try:
                    await self._run(jobs[0], halving)
                finally:
                    self._running.discard(jobs[0].name)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.at_once):
                    group.create_task(work())
        except ExceptionGroup as errors:  # one message is enough: the others follow from the first
            raise errors.exceptions[0] from None

    def _time_for(self, reserve: bool) -> bool:
        """True if a whole run and, with `reserve`, the finalists fit into the time that is left. The first run always
        fits: nobody knows yet how long it takes."""
        longest = max((state.seconds for state in self._ended() if state.outcome == COMPLETE), default=0.0)
        further = self.plan.finalists * (self.plan.seeds - 1) if reserve else 0
        runs = 1 + further / self.at_once
        return self.events.seconds + runs * longest <= self.hours * 3600

    async def _run(self, job: Job, halving: Halving | None) -> None:
        """One run, from its start or where it was cut until it ends or is stopped."""
        if self.events.run(job.name).outcome == STOPPED_BY_ASHA:
            self.events.again(job.name)
        process = TrialProcess(
            self.directory_of(job), self._arguments(job), grace_s=self.grace_s, command=self.command, poll_s=self.poll_s
        )
        process.directory.parent.mkdir(exist_ok=True)
        self.watcher.started(job, continues=(process.directory / "config.toml").exists())
        self._progress()
        look = _Look(self, job, process.directory, halving)
        code, began = 0, self.events.seconds
        try:
            if process.is_complete:  # it ended after an earlier start of the command was killed
                look()
            else:
                code = await process.run(look)
        except BaseException:
            self.events.end(job.name, CUT, self.events.seconds - began)
            raise
        self._end(job, process, code, self.events.seconds - began)
        self.watcher.ended(job, self.events.run(job.name))
        self._progress()

    def _end(self, job: Job, process: TrialProcess, code: int, seconds: float) -> None:
        """Writes down how a run has ended. Raises UserError if no run has done a step yet: the next one would hardly do
        better."""
        state = self.events.run(job.name)
        if process.is_complete:
            self.events.end(job.name, COMPLETE, seconds)
        elif state.outcome is not None:
            self.events.end(job.name, state.outcome, seconds)
        elif any((self.directory_of(one) / "metrics.jsonl").exists() for one in self._jobs()):
            self.events.end(job.name, FAILED, seconds, f"exit code {code}: {process.last_words()}")
        else:
            self.events.end(job.name, CUT, seconds)
            raise UserError(
                f"trial {job.trial} failed before its first step with exit code {code}: {process.last_words()} (all of "
                f"its output is in {process.log})"
            )

    def _arguments(self, job: Job) -> list[str]:
        settings = {**self.plan.trials[job.trial - 1], "seed": self.plan.seed + job.repeat}
        return ["train", str(self.directory / "config.toml"), *as_overrides(settings)]

    def _jobs(self) -> list[Job]:
        """Every run that the tuning may have."""
        return [Job(job.trial, repeat) for job in self.trials for repeat in range(self.plan.seeds)]

    def _ended(self) -> list[RunState]:
        states = (self.events.run(job.name) for job in self._jobs())
        return [state for state in states if state.outcome is not None]

    def _progress(self) -> None:
        ended = self._ended()
        total = len(self.trials) + self.plan.finalists * (self.plan.seeds - 1)
        left: float | None = None
        if ended:
            mean = sum(state.seconds for state in ended) / len(ended)
            budget = self.hours * 3600 - self.events.seconds
            left = max(0.0, min(mean * (total - len(ended)) / self.at_once, budget))
        self.watcher.progress(len(ended), total, left)


@dataclass
class _Look:
    """Reads new evaluations and health events of a run. True: stop it."""

    search: Search
    job: Job
    directory: Path
    halving: Halving | None

    def __post_init__(self) -> None:
        self._seen: tuple[int, ...] = ()  # sizes of the two files

    def __call__(self) -> bool:
        sizes = tuple(_size(self.directory / name) for name in ("evaluations.jsonl", "metrics.jsonl"))
        if sizes == self._seen:
            return False
        self._seen = sizes
        events, name, plan = self.search.events, self.job.name, self.search.plan
        state = events.run(name)
        for record in evaluations(self.directory):
            step = record["policy_version"]
            if (
                step in state.results or state.outcome is not None
            ):  # what comes after a decision to stop depends on time
                continue
            value = metric_of(record, plan.metric)
            if value is None:
                continue
            events.result(name, step, value)
            self.search.watcher.result(self.job, step, value)
            if state.outcome is None and self.halving is not None and not self.halving.goes_on(name, step, value):
                events.stop(name, STOPPED_BY_ASHA, below(step, value))
        may_stop = state.outcome is None and self.halving is not None
        if may_stop and (reason := ruined(read_records(self.directory / "metrics.jsonl"))) is not None:
            events.stop(name, STOPPED_BY_HEALTH, reason)
        return state.outcome is not None


def below(step: int, value: float) -> str:
    """Why ASHA has stopped a trial."""
    return f"{value:.4g} at step {step} is not in the best third of the trials that had come this far"


def _able(state: RunState) -> bool:
    """True if a trial can be a finalist: it is complete, or only ASHA has stopped it."""
    return state.outcome in (COMPLETE, STOPPED_BY_ASHA) or (state.again and state.outcome is None)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
