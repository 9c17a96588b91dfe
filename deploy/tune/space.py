"""The search space of `ratchet tune`: what KEY=SPACE means, and the values that each trial gets. Runs anywhere.

The values are a Latin hypercube (McKay et al. 1979): every choice is drawn equally often, and the values of a range are
spread evenly over it. Ray Tune's own searchers draw each value by chance. A few such draws leave gaps, and their keys
are correlated.
"""

from __future__ import annotations

import itertools
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.config.overrides import override_value, toml_text
from common.errors import UserError

_NUMBER = r"[+-]?[0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
_RANGE = re.compile(rf"(log:)?({_NUMBER})\.\.({_NUMBER})")
_NO_RANGE = re.compile(r"log:[+-]?\.?[0-9]|[+-]?\.?[0-9].*\.\.")  # looks like a range; ../prompts.jsonl does not
_DIGITS = 4  # fewest significant digits of a number drawn from a range, which keep commands short
_MOST_DIGITS = 17  # with this many, every float is exact
_FINENESS = 2000  # rounding moves a number by at most this part of its range, so that trials still differ
_MOST_COMBINATIONS = 10_000  # with up to this many combinations of choices, distinct ones are drawn from their list
_DESIGNS, _CHOICE_DESIGNS = 200, 20  # number of designs from which the best is taken; those from a list take longer

Settings = Mapping[str, Any]  # values of a trial by key


@dataclass(frozen=True)
class Choices:
    """Values of a key, such as ppo.clip_eps=0.05,0.1,0.2."""

    key: str
    values: tuple[Any, ...]

    def at(self, quantile: float) -> Any:
        return self.values[int(quantile * len(self.values))]


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included, spread evenly; with `log`, evenly on a logarithmic scale."""

    key: str
    low: float
    high: float
    log: bool
    whole: bool  # integers

    def at(self, quantile: float) -> float:
        low, high = (self.low - 0.5, self.high + 0.5) if self.whole else (self.low, self.high)
        if self.log:
            value = math.exp(math.log(low) + quantile * (math.log(high) - math.log(low)))
        else:
            value = low + quantile * (high - low)
        value = min(max(value, self.low), self.high)
        return round(value) if self.whole else self._rounded(value)

    def _rounded(self, value: float) -> float:
        """The value with few significant digits. A narrow range, such as 0.999..0.9999, needs more of them: otherwise
        values would be equal or leave the range."""
        rounded = (float(f"{value:.{digits}g}") for digits in range(_DIGITS, _MOST_DIGITS))
        fine = (self.high - self.low) / _FINENESS
        return next(
            (short for short in rounded if self.low <= short <= self.high and abs(short - value) <= fine), value
        )

    def place(self, value: float) -> float:
        """The value's place on the scale of the range: the value, or its decimal logarithm."""
        return math.log10(value) if self.log else float(value)


Space = Choices | Range


def parse_space(argument: str) -> Space:
    """The space of one KEY=SPACE argument. A single value is a choice of one. Raises UserError."""
    key, separator, text = argument.partition("=")
    if not separator or not key or not text:
        raise UserError(
            f"{argument!r} must read KEY=SPACE: values (ppo.clip_eps=0.05,0.1), a range (kl.coef=0..0.1) or a range on "
            "a logarithmic scale (optimizer.learning_rate=log:1e-6..1e-4)"
        )
    if match := _RANGE.fullmatch(text):
        return _range(argument, key, *match.groups())
    if _NO_RANGE.match(text):
        raise UserError(f"{argument}: a range is two numbers, such as 0.1..0.5 or log:1e-6..1e-4")
    values = _values(argument, text)
    if len(distinct := {toml_text(value) for value in values}) < len(values):
        raise UserError(f"{argument} names a value twice ({len(values)} values, {len(distinct)} different ones)")
    return Choices(key, values)


def _range(argument: str, key: str, log: str | None, low: str, high: str) -> Range:
    whole = not re.search(r"[.eE]", low + high)
    first, last = float(low), float(high)
    if not (math.isfinite(first) and math.isfinite(last) and first < last):
        raise UserError(f"{argument}: the first number of a range must be below the second")
    if log and first <= 0:
        raise UserError(f"{argument}: a range on a logarithmic scale must begin above 0")
    return Range(key, first, last, log is not None, whole)


def _values(argument: str, text: str) -> tuple[Any, ...]:
    """The values between commas. A comma inside a TOML list, table or string separates nothing."""
    try:
        values = tomllib.loads(f"values = [{text}]")["values"]
    except (ValueError, RecursionError):  # a bare word, which is a string
        values = [override_value(argument, part.strip()) for part in text.split(",")]
    if not values or any(value == "" for value in values):
        raise UserError(f"{argument}: a value between two commas is missing")
    return tuple(values)


def draw(spaces: Sequence[Space], trials: int, *, seed: int) -> list[dict[str, Any]]:
    """The settings of each trial; no two trials have the same. If the choices have fewer than `trials` combinations,
    there is one trial for each combination.

    Draws many designs and takes the one with the least correlated keys. In a single design of few trials, a key without
    any effect is often correlated with a key that has one, and then seems to have an effect too."""
    rng = np.random.default_rng(seed)
    choices = [space for space in spaces if isinstance(space, Choices)]
    combinations = math.prod(len(space.values) for space in choices)
    if len(choices) == len(spaces) and combinations <= _MOST_COMBINATIONS:
        count = min(trials, combinations)
        designs = [_combinations(choices, count, rng) for _ in range(1 if count == combinations else _CHOICE_DESIGNS)]
    else:
        designs = [_distinct(_hypercube(spaces, trials, rng)) for _ in range(_DESIGNS)]
    return min(designs, key=lambda drawn: (-len(drawn), _dependence(spaces, drawn)))


def _combinations(choices: Sequence[Choices], count: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Distinct combinations. Each next one has the values that were used least often so far, at random among equals."""
    left = rng.permutation(list(itertools.product(*(range(len(space.values)) for space in choices))))
    taken = [np.zeros(len(space.values), int) for space in choices]
    drawn = []
    for _ in range(count):
        row = int(np.argmin(sum(counts[left[:, key]] for key, counts in enumerate(taken))))
        one, left = left[row], np.delete(left, row, axis=0)
        for counts, value in zip(taken, one):
            counts[value] += 1
        drawn.append({space.key: space.values[value] for space, value in zip(choices, one)})
    return drawn


def _hypercube(spaces: Sequence[Space], trials: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Divides each space into `trials` equal parts and draws once from each part. Each space has its own order."""
    columns = [[space.at(q) for q in (rng.permutation(trials) + rng.random(trials)) / trials] for space in spaces]
    return [{space.key: column[row] for space, column in zip(spaces, columns)} for row in range(trials)]


def _distinct(drawn: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({toml_text(settings): settings for settings in drawn}.values())


def _dependence(spaces: Sequence[Space], drawn: Sequence[Settings]) -> float:
    """The largest correlation between terms of two different keys (see `_terms`)."""
    terms, owners = [], []
    for owner, space in enumerate(spaces):
        for term in _terms(space, [settings[space.key] for settings in drawn]):
            if np.ptp(term) > 0:
                terms.append((term - term.mean()) / term.std())
                owners.append(owner)
    if not terms:
        return 0.0
    correlations = np.abs(np.array(terms) @ np.array(terms).T) / len(drawn)
    return float((correlations * (np.array(owners)[:, None] != np.array(owners))).max())


def _terms(space: Space, values: Sequence[Any]) -> list[np.ndarray]:
    if isinstance(space, Choices):
        return [np.array([toml_text(value) == toml_text(choice) for value in values], float) for choice in space.values]
    places = np.array([space.place(value) for value in values])
    return [places, (places - places.mean()) ** 2]
