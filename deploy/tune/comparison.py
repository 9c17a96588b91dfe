"""Compares trials at equal steps, to see how much each key mattered: DIR/sensitivity.json. Runs anywhere.

ASHA stops trials with low outcomes, so later steps have only selected trials. The comparison without this selection is
at the last step before which ASHA stopped nothing (`unselected`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.config.overrides import toml_text
from deploy.screen.text import significant
from deploy.tune.events import BROKEN, STOPPED_BY_ASHA, RunState
from deploy.tune.plan import Plan
from deploy.tune.sensitivity import FEWEST, Column, Effect, effect_of
from deploy.tune.space import Choices, Range, Space


@dataclass(frozen=True)
class Comparison:
    """The trials that have reached one step."""

    step: int
    numbers: tuple[int, ...]  # of the trials, from 1
    outcomes: tuple[float, ...]
    counted_as_worst: tuple[int, ...]  # trials that a health rule or a failure ended before this step
    stopped_before: int  # number of trials that ASHA stopped before this step, because of their outcome
    effects: tuple[Effect, ...] = ()  # of each key, the most important one first; none with too few trials


def comparisons(plan: Plan, trials: Mapping[int, RunState]) -> list[Comparison]:
    """One comparison for each rung, and one for the end. `trials`: as in Outcome.states."""
    found = (compared_at(step, trials) for step in [*plan.rungs, plan.num_steps])
    return [replace(one, effects=tuple(_effects(plan, one))) for one in found]


def compared_at(step: int, trials: Mapping[int, RunState]) -> Comparison:
    """The trials with an outcome at this step. A trial that a health rule or a failure ended earlier counts with the
    worst outcome of the others. Otherwise the comparison would not find the key that ruined the trial."""
    found = {number: state.results[step] for number, state in trials.items() if step in state.results}
    ruined = [number for number, state in trials.items() if state.outcome in BROKEN and step not in state.results]
    worst = min(found.values(), default=0.0)
    outcomes = found | (dict.fromkeys(ruined, worst) if found else {})
    stopped = sum(state.outcome == STOPPED_BY_ASHA and step > (state.last or (-1, 0))[0] for state in trials.values())
    numbers = tuple(sorted(outcomes))
    return Comparison(step, numbers, tuple(outcomes[n] for n in numbers), tuple(ruined if found else ()), stopped)


def unselected(found: Sequence[Comparison]) -> Comparison:
    """The last step before which ASHA has stopped nothing; the first step if there is none."""
    return next((one for one in reversed(found) if not one.stopped_before and one.numbers), found[0])


def _effects(plan: Plan, at: Comparison) -> list[Effect]:
    if len(at.numbers) < FEWEST:
        return []
    settings = [plan.trials[number - 1] for number in at.numbers]
    found = [effect_of(_column(space, settings), at.outcomes, seed=plan.seed) for space in plan.keys]
    return sorted(found, key=lambda effect: (effect.p, -effect.explained))


def _column(space: Space, settings: Sequence[Mapping[str, Any]]) -> Column:
    if isinstance(space, Choices):
        numbers = {toml_text(value): float(number) for number, value in enumerate(space.values)}
        return Column(space.key, tuple(numbers[toml_text(one[space.key])] for one in settings), space.values)
    return Column(space.key, tuple(space.place(one[space.key]) for one in settings), log=space.log)


def sensitivity_record(plan: Plan, found: Sequence[Comparison], noise: float | None) -> dict[str, Any]:
    """The contents of sensitivity.json. `noise`: standard deviation of the outcome between seeds."""
    headline = unselected(found)
    return {
        "metric": plan.metric,
        "compared_at_step": headline.step,
        "seed_deviation": noise,
        "steps": [_record(plan, one) for one in found if one.numbers],
    }


def _record(plan: Plan, at: Comparison) -> dict[str, Any]:
    spaces = {space.key: space for space in plan.keys}
    return {
        "step": at.step,
        "trials": list(at.numbers),
        "counted_as_worst": list(at.counted_as_worst),
        "stopped_by_asha_before": at.stopped_before,
        "keys": [_key_record(plan, at, effect, spaces[effect.key]) for effect in at.effects],
    }


def _key_record(plan: Plan, at: Comparison, effect: Effect, space: Space) -> dict[str, Any]:
    record: dict[str, Any] = {
        "key": effect.key,
        "mattered": effect.mattered,
        "explained": {"value": effect.explained, "interval": effect.explained_interval},
        "p": effect.p,
        "smallest_p": effect.smallest_p,
        "best": value_of(space, effect.best),
        "sentence": sentence(plan, at, effect),
    }
    if isinstance(space, Range):
        slope = None if effect.slope is None else {"value": effect.slope, "interval": effect.slope_interval}
        record |= {"scale": "log10" if space.log else "linear", "slope": slope}
    else:
        record["values"] = effect.means
    return record


def value_of(space: Space, best: Any) -> Any:
    """A choice, or the value at a place on the scale of a range."""
    if isinstance(space, Choices):
        return best
    value = float(significant(10**best if space.log else best))
    return round(value) if space.whole else value


def sentence(plan: Plan, at: Comparison, effect: Effect) -> str:
    """What the trials say about a key."""
    low, high = effect.explained_interval
    share = f"{effect.explained:.0%} of the variance of {plan.metric} at step {at.step} ({low:.0%} to {high:.0%})"
    [space] = [space for space in plan.keys if space.key == effect.key]
    if not effect.can_tell:
        return f"{len(at.numbers)} trials are too few to tell whether {effect.key} mattered (it explains {share})"
    if not effect.mattered:
        return f"{effect.key} did not matter as far as {len(at.numbers)} trials can tell (it explains {share})"
    return f"{effect.key} mattered: it explains {share}; best near {toml_text(value_of(space, effect.best))}"


def title_of(at: Comparison) -> str:
    """A title that says which trials are compared."""
    worst = f", {len(at.counted_as_worst)} of them ended before and counted as the worst" * bool(at.counted_as_worst)
    chosen = ", chosen by their outcome" * bool(at.stopped_before)
    return f"how much each key mattered: {len(at.numbers)} trials at step {at.step}{chosen}{worst}"


def effect_text(effect: Effect, space: Space) -> str:
    """The slope of a range with its interval, or the mean of each choice."""
    if isinstance(space, Choices):
        return ", ".join(f"{toml_text(one['value'])}: {significant(one['mean'], 3)}" for one in effect.means or ())
    if effect.slope is None or effect.slope_interval is None:
        return "one value"
    low, high = (significant(bound, 2) for bound in effect.slope_interval)
    unit = "a factor of 10" if space.log else "1"
    return f"{effect.slope:+.2g} for {unit} ({low} to {high})"
