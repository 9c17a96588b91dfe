"""Runs a tuning: all trials first, then the finalists with further seeds. Runs in the driver."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from shlex import quote
from typing import Protocol

from common.config.overrides import as_overrides
from common.errors import UserError
from deploy.restarts import driver_command
from deploy.tune.events import COMPLETE, CUT, FAILED, STOPPED_BY_ASHA, RunState
from deploy.tune.following import Follower, Job, Listener, below
from deploy.tune.halving import Halving
from deploy.tune.runs import Runs
from deploy.tune.trial_process import POLL_S, Command, TrialProcess

FAILED_IN_A_ROW = 3  # the tuning ends if this many runs fail and no run has an evaluation in between


class Watcher(Listener, Protocol):
    """The part of the screen that follows a search."""

    def started(self, job: Job, *, continues: bool) -> None:
        """A run begins or continues."""

    def ended(self, job: Job, state: RunState) -> None:
        """A run has ended."""

    def progress(self, done: int, total: int, left_s: float | None) -> None:
        """`done` runs have ended, of the `total` that the tuning may need."""


@dataclass
class Search(Runs):
    """A tuning in progress."""

    watcher: Watcher
    hours: float  # of all starts of the command together
    at_once: int = 1
    grace_s: float = 0.0  # see TrialProcess
    command: Command = driver_command
    poll_s: float = POLL_S

    def __post_init__(self) -> None:
        super().__post_init__()
        self._running: set[str] = set()

    async def run(self) -> None:
        """Runs all missing trials and repeats that fit into the time."""
        try:
            async with asyncio.timeout(max(0.0, self.hours * 3600 - self.events.seconds)) as limit:
                halving = self._halving()
                for reserve in (True, False):  # the time that the finalists leave is for more trials
                    await self._all(self.waiting_trials, halving, reserve=reserve)
                    await self._all(self.waiting_repeats)
        except TimeoutError:  # a network disk has errors of this type too
            if not limit.expired():
                raise

    def _halving(self) -> Halving:
        """ASHA with all results so far. Records stops that a killed command had decided but not recorded."""
        halving = self.events.halving(self.plan.rungs, {job.name for job in self.trials})
        for job in self.trials:
            state = self.events.run(job.name)
            if job.name in halving.stopped and state.outcome is None and not state.continues_as_finalist:
                self.events.stop(job.name, STOPPED_BY_ASHA, below(*(state.last or (0, 0.0))))
        return halving

    async def _all(
        self, waiting: Callable[[], list[Job]], halving: Halving | None = None, *, reserve: bool = False
    ) -> None:
        """Runs the waiting jobs, `at_once` at the same time, until none is left or the next one would not end in time.
        With `reserve`, time for the finalists' further seeds is kept free. Runs that have failed come last."""

        async def work() -> None:
            while self._time_for(reserve) and (jobs := [job for job in waiting() if job.name not in self._running]):
                jobs.sort(key=lambda job: self.events.run(job.name).failures)
                self._running.add(jobs[0].name)
                try:
                    await self._run(jobs[0], halving)
                finally:
                    self._running.discard(jobs[0].name)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self.at_once):
                    group.create_task(work())
        except ExceptionGroup as errors:  # one message is enough: the first error causes the others
            raise errors.exceptions[0] from None

    def _time_for(self, reserve: bool) -> bool:
        """True if a whole run fits into the remaining time. With `reserve`, the finalists must fit too, in at most half
        of all the time: otherwise they would leave none for trials. The first run always fits, because its duration is
        not known yet."""
        longest = max((state.seconds for state in self._ended() if state.outcome == COMPLETE), default=0.0)
        limit_s = self.hours * 3600
        if reserve:
            further = self.plan.finalists * (self.plan.seeds - 1)
            limit_s -= min(further / self.at_once * longest, limit_s / 2)
        return self.events.seconds + longest <= limit_s

    async def _run(self, job: Job, halving: Halving | None) -> None:
        """Starts or continues one run. Returns when it has ended or was stopped."""
        if self.events.run(job.name).outcome == STOPPED_BY_ASHA:
            self.events.continue_as_finalist(job.name)
        process = TrialProcess(
            self.directory_of(job), self._arguments(job), grace_s=self.grace_s, command=self.command, poll_s=self.poll_s
        )
        process.directory.parent.mkdir(exist_ok=True)
        self._progress()
        self.watcher.started(job, continues=(process.directory / "config.toml").exists())
        follower = Follower(job, process.directory, self.plan.metric, self.events, self.watcher, halving)
        code, began = 0, self.events.seconds
        try:
            if not process.is_complete:  # a run may complete after its tuning was killed
                code = await process.run(follower.read_new)
        except BaseException:
            self.events.end(job.name, CUT, self.events.seconds - began)
            raise
        self._end(job, process, code, self.events.seconds - began)
        follower.read_evaluations()  # of a complete run, all evaluations count
        self.watcher.ended(job, self.events.run(job.name))
        self._progress()

    def _end(self, job: Job, process: TrialProcess, code: int, seconds: float) -> None:
        """Records how a run has ended. A run that fails for the first time may do so because of the machine and not of
        its values, so it is tried once more. Raises UserError after FAILED_IN_A_ROW such failures."""
        state = self.events.run(job.name)
        outcome = COMPLETE if process.is_complete else state.outcome
        if outcome is not None:
            self.events.end(job.name, outcome, seconds)
            return
        why = f"exit code {code}: {process.error_message()}"
        self.events.end(job.name, FAILED if state.failures else CUT, seconds, why)
        if state.outcome != FAILED and len(self.events.failed_in_a_row) >= min(FAILED_IN_A_ROW, len(self.trials)):
            raise UserError(self._failed_in_a_row(job, process, why))

    def _failed_in_a_row(self, last: Job, process: TrialProcess, why: str) -> str:
        in_a_row = self.events.failed_in_a_row
        names = ", ".join(name.lstrip("0") for name in in_a_row)
        failed = f"{len(in_a_row)} run(s) in a row have failed without an evaluation in between (trial {names})"
        return (
            f"{failed}; trial {last.name.lstrip('0')} ended with {why} (all of its output is in {process.log}). If "
            "values of the trials are the cause, leave these out and begin again with --force; if not, remove the "
            f"cause and continue with ratchet tune --resume {quote(str(self.directory))}"
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
