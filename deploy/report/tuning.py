"""The page of a tuning: its trials with their curves, the finalists, and which keys mattered. Runs anywhere.

`ratchet report` of a directory of `ratchet tune` has this tab alone. The tuning may still run: everything is computed
from plan.json and events.jsonl, as the command computes it at its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.config.overrides import as_overrides, toml_text
from deploy.report.curves import short
from deploy.tune.comparison import Comparison, effect_text, sentence, title_of, unselected, value_of
from deploy.tune.events import CUT, EVENTS, Events
from deploy.tune.following import Job
from deploy.tune.outcome import Finalist, Outcome, outcome_of
from deploy.tune.plan import Plan
from deploy.tune.runs import Runs
from deploy.tune.sensitivity import FEWEST, Effect
from deploy.tune.space import Range, Space


def tuning_of(directory: Path, *, running: bool = False) -> dict[str, Any]:
    """The data of the tab. Raises UserError if the plan or the events cannot be read."""
    plan = Plan.read(directory)
    runs = Runs(plan, directory, Events(directory / EVENTS))
    outcome = outcome_of(runs)
    finalists = [one.trial for one in outcome.finalists]
    begun = "runs" if running else CUT
    return {
        "metric": plan.metric,
        "num_steps": plan.num_steps,
        "steps": [*plan.rungs, plan.num_steps],
        "rungs": list(plan.rungs),
        "spaces": list(plan.spaces),
        "hours": round(runs.events.seconds / 3600, 2),
        "missing": outcome.missing,
        "reason": outcome.reason,
        "best": _settings(plan, finalists[0]) if finalists else "",
        "trials": [_run(runs, job, finalists, begun) for job in runs.trials],
        "repeats": [_run(runs, job, finalists, begun) for job in runs.repeats() if runs.has_begun(job)],
        "finalists": [_finalist(plan, one) for one in outcome.finalists],
        "sensitivity": _sensitivity(plan, outcome),
    }


def _run(runs: Runs, job: Job, finalists: list[int], begun: str) -> dict[str, Any]:
    """A run with its evaluations. `place`: its trial's place among the finalists, from 0; None for other trials.
    `begun`: the state of a run that has started and not ended."""
    state = runs.events.run(job.name)
    return {
        "trial": job.trial,
        "seed": runs.plan.seed + job.repeat,
        "settings": _settings(runs.plan, job.trial),
        "place": finalists.index(job.trial) if job.trial in finalists else None,
        "ended": state.outcome or (begun if runs.has_begun(job) else "not begun"),
        "why": state.why,
        "minutes": short(state.seconds / 60),
        "directory": str(runs.directory_of(job).relative_to(runs.directory)),
        "curve": [[step, short(value)] for step, value in sorted(state.results.items())],
    }


def _finalist(plan: Plan, one: Finalist) -> dict[str, Any]:
    return {
        "trial": one.trial,
        "settings": _settings(plan, one.trial),
        "step": one.step,
        "values": [short(value) for value in one.values],
        "mean": short(one.mean),
        "deviation": None if one.deviation is None else short(one.deviation),
        "failed": one.failed,
    }


def _sensitivity(plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """The effect of each key, the most important first, at the last step before ASHA stopped a trial."""
    at = unselected(outcome.compared)
    spaces = {space.key: space for space in plan.keys}
    few = f"{len(at.numbers)} trial(s) at step {at.step}: at least {FEWEST} are needed to compare keys"
    return {
        "title": title_of(at) if at.effects else few,
        "deviation": None if outcome.seed_deviation is None else short(outcome.seed_deviation),
        "keys": [_key(plan, at, effect, spaces[effect.key]) for effect in at.effects],
    }


def _key(plan: Plan, at: Comparison, effect: Effect, space: Space) -> dict[str, Any]:
    """What a key did. `means`: of choices, [text, [mean, low, high]]; `points`: of a range, [value, outcome, trial]."""
    low, high = effect.explained_interval
    settings = {number: plan.trials[number - 1][space.key] for number in at.numbers}
    return {
        "key": space.key,
        "mattered": effect.mattered,
        "explained": [short(effect.explained), short(low), short(high)],
        "effect": effect_text(effect, space),
        "best": toml_text(value_of(space, effect.best)),
        "sentence": sentence(plan, at, effect),
        "log": isinstance(space, Range) and space.log,
        "means": [[toml_text(one["value"]), _mean(one)] for one in effect.means or ()],
        "points": [
            [settings[number], short(value), number] for number, value in zip(at.numbers, at.outcomes, strict=True)
        ]
        if isinstance(space, Range)
        else [],
    }


def _mean(one: Mapping[str, Any]) -> list[float | None]:
    low, high = (None, None) if one["interval"] is None else map(short, one["interval"])
    return [short(one["mean"]), low, high]


def _settings(plan: Plan, trial: int) -> str:
    return " ".join(as_overrides(plan.trials[trial - 1]))
