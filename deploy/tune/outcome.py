"""The result of a tuning: DIR/tune.json, DIR/best.toml and DIR/sensitivity.json. Runs in the driver."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from common.config.loading import load_config
from common.config.overrides import as_overrides
from common.config.ppo import Config
from common.files import write_json, write_whole
from common.student import student_quantile
from deploy.screen.text import significant
from deploy.tune.comparison import Comparison, comparisons, sensitivity_record
from deploy.tune.events import BROKEN, COMPLETE, CUT, RunState
from deploy.tune.following import Job
from deploy.tune.plan import Plan
from deploy.tune.runs import Runs


@dataclass(frozen=True)
class Finalist:
    """A trial with the outcomes of all of its seeds that are complete."""

    trial: int
    values: tuple[float, ...]
    step: int  # of the values: the last step, or that of the newest evaluation if the trial is not complete
    failed: int = 0  # number of seeds whose run has failed; they have no value and are not in the mean

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation between its seeds; None with one seed."""
        return stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Outcome:
    """What a tuning has found so far."""

    plan: Plan
    states: dict[int, RunState]  # of the trials that have an evaluation, have failed or were ended, by number
    finalists: tuple[Finalist, ...]  # the best first
    compared: tuple[Comparison, ...]
    missing: int  # number of runs that did not fit into the time

    @property
    def seed_deviation(self) -> float | None:
        """Standard deviation of the outcome between seeds, pooled over the finalists."""
        squares = sum((len(one.values) - 1) * (one.deviation or 0.0) ** 2 for one in self.finalists)
        return math.sqrt(squares / self._freedom) if self._freedom else None

    @property
    def _freedom(self) -> int:
        """Degrees of freedom of `seed_deviation`."""
        return sum(len(one.values) - 1 for one in self.finalists)

    @property
    def reason(self) -> str:
        """Why the best trial is the best."""
        if not self.finalists:
            return "no trial has an evaluation after its start, except those that failed or that a health rule ended"
        best, *others = self.finalists
        metric = self.plan.metric
        if best.step < self.plan.num_steps:
            return (
                f"no trial is complete, and trial {best.trial} has done the most steps so far: {metric} "
                f"{significant(best.mean)} at step {best.step}"
            )
        seeds = f"the mean of {len(best.values)} seeds" if len(best.values) > 1 else "with one seed"
        text = f"trial {best.trial} has {metric} {significant(best.mean)} at the last step, {seeds}{_failures(best)}"
        if not others:
            return text
        return f"{text}; {self._against(best, others[0])}"

    def _against(self, best: Finalist, second: Finalist) -> str:
        if second.failed > best.failed:
            return f"trial {second.trial} is the next one: {significant(second.mean)}{_failures(second)}"
        gap = best.mean - second.mean
        text = f"{significant(gap, 2)} above trial {second.trial}"
        noise = self.seed_deviation
        if second.step < self.plan.num_steps:
            return f"trial {second.trial} is the next one, and is not complete"
        if noise is None:
            return f"{text}; how much of that is chance is not known, because no trial has several seeds"
        error = noise * math.sqrt(1 / len(best.values) + 1 / len(second.values))
        # Student's t: with few seeds the deviation is very uncertain. Two equal trials with 3 seeds each are 2 standard
        # errors apart in 12 % of the cases.
        reach = student_quantile(0.975, self._freedom) * error
        verdict = "so it is better" if gap > reach else "so the two are not clearly different"
        return f"{text} (95 % interval {significant(gap - reach, 2)} to {significant(gap + reach, 2)}), {verdict}"


def outcome_of(runs: Runs) -> Outcome:
    """The outcome of what has run so far."""
    all_states = {job.trial: runs.events.run(job.name) for job in runs.trials}
    states = {trial: state for trial, state in all_states.items() if state.results or state.outcome in BROKEN}
    known = _known(runs, runs.finalists())
    if all(one.step < runs.plan.num_steps for one in known):
        known = _known(runs, runs.finalists(interrupted=True))
    # A failure counts as the worst outcome, as in the comparison of trials: a good mean of the other seeds cannot make
    # up for it.
    known.sort(key=lambda one: (one.step, -one.failed, one.mean), reverse=True)
    missing = len(runs.waiting_trials()) + len(runs.waiting_repeats())
    return Outcome(runs.plan, states, tuple(known), tuple(comparisons(runs.plan, states)), missing)


def _known(runs: Runs, jobs: Sequence[Job]) -> list[Finalist]:
    """Those of the trials that have an evaluation after their start."""
    return [one for job in jobs if (one := _finalist(runs, job)) is not None]


def _finalist(runs: Runs, job: Job) -> Finalist | None:
    """The trial as a finalist; None if it has no evaluation after its start."""
    end = runs.plan.num_steps
    states = [runs.events.run(Job(job.trial, repeat).name) for repeat in range(runs.plan.seeds)]
    complete = [state.results[end] for state in states if state.outcome == COMPLETE and end in state.results]
    if complete:
        return Finalist(job.trial, tuple(complete), end, failed=sum(state.outcome in BROKEN for state in states))
    step, value = states[0].last or (0, 0.0)
    return Finalist(job.trial, (value,), step) if step else None


def _failures(one: Finalist) -> str:
    return f", and {one.failed} seed(s) failed" if one.failed else ""


def write_outcome(outcome: Outcome, runs: Runs) -> None:
    """Writes all files. They are derived, so a tuning that continues writes them again."""
    plan, directory = outcome.plan, runs.directory
    write_json(directory / "sensitivity.json", sensitivity_record(plan, outcome.compared, outcome.seed_deviation))
    best = outcome.finalists[0].trial if outcome.finalists else None
    if best is not None:
        settings = as_overrides(plan.trials[best - 1])
        cfg = load_config(directory / "config.toml", as_overrides(plan.given) + settings, Config)
        comment = "".join(f"# {line}\n" for line in [f"From ratchet tune: {outcome.reason}.", *settings])
        write_whole(directory / "best.toml", comment + cfg.to_toml())
    write_json(directory / "tune.json", _record(outcome, runs, best))


def _record(outcome: Outcome, runs: Runs, best: int | None) -> dict[str, Any]:
    plan = outcome.plan
    return {
        "metric": plan.metric,
        "best": None if best is None else {"trial": best, "settings": plan.trials[best - 1], "reason": outcome.reason},
        "finalists": [_finalist_record(one, plan) for one in outcome.finalists],
        "seed_deviation": outcome.seed_deviation,
        "missing_runs": outcome.missing,
        "hours": round(runs.events.seconds / 3600, 3),
        "rungs": plan.rungs,
        "trials": [_run_record(job, runs) for job in runs.trials],
        "repeats": [_run_record(job, runs) for job in runs.repeats() if runs.directory_of(job).exists()],
    }


def _finalist_record(one: Finalist, plan: Plan) -> dict[str, Any]:
    return {
        "trial": one.trial,
        "settings": plan.trials[one.trial - 1],
        "step": one.step,
        "values": one.values,
        "mean": one.mean,
        "deviation": one.deviation,
        "failed_seeds": one.failed,
    }


def _run_record(job: Job, runs: Runs) -> dict[str, Any]:
    state = runs.events.run(job.name)
    return {
        "trial": job.trial,
        "seed": runs.plan.seed + job.repeat,
        "settings": runs.plan.trials[job.trial - 1],
        "directory": str(runs.directory_of(job).relative_to(runs.directory)),
        "outcome": state.outcome or (CUT if runs.has_begun(job) else "not begun"),
        "why": state.why,
        "results": {str(step): value for step, value in sorted(state.results.items())},
        "seconds": round(state.seconds, 1),
    }
