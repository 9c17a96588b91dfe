"""The tables of docs/results.md, from the figures of finished runs (tests/results/measured.py).

Every number is the mean over the seeds, with its 95 % interval of Student's t in parentheses: mean plus and minus
t(n - 1) times the standard deviation divided by the root of n. With few seeds such an interval is wide, and it should
be. A number that some seeds lack ("to 90 %") has no mean: the cell says how many have it, and their values.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence

from common.student import student_quantile
from tests.results.measured import CRITIC_SECONDS, Figures, Measured
from tests.results.works import Arm, Column, Experiment


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % t-interval of the mean; None for a single value."""
    if len(values) < 2:
        return None
    half = student_quantile(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.fmean(values)
    return mean - half, mean + half


def cell(values: Sequence[float | None], column: Column) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return column.missing
    if len(known) < len(values):
        return f"{len(known)} of {len(values)}: {', '.join(column.form.format(value) for value in known)}"
    bounds = interval(known)
    mean = column.form.format(statistics.fmean(known))
    return mean if bounds is None else f"{mean} ({column.form.format(bounds[0])} to {column.form.format(bounds[1])})"


def table(experiment: Experiment, arms: Sequence[Arm], measured: Measured) -> str:
    """The rows of the arms that have figures, as Markdown. An experiment with one arm has a row for each number
    instead."""
    lines = [["", "seeds", *(column.title for column in experiment.columns)]]
    for arm in arms:
        if runs := list(measured.get(arm.work.name, {}).values()):
            cells = (cell([run.get(column.title) for run in runs], column) for column in experiment.columns)
            lines.append([arm.title + _before(arm, runs), str(len(runs)), *cells])
    if len(arms) == 1:
        lines = [list(column) for column in zip(*lines, strict=True)]
    head, *rows = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(lines[0]), *rows])


def _before(arm: Arm, runs: Sequence[Figures]) -> str:
    """The responses and seconds that this arm's critic needed before the run, for its row."""
    if arm.critic is None:
        return ""
    taken = [seconds for run in runs if (seconds := run.get(CRITIC_SECONDS)) is not None]
    seconds = f" and {statistics.fmean(taken):.0f} s" if taken else ""
    return f" (+ {arm.critic_responses} responses{seconds} before the run)"


def section(experiment: Experiment, name: str, arms: Sequence[Arm], measured: Measured) -> str:
    """The generated part of the page: what is compared, the table, and how to make it again."""
    seeds = sorted({seed for found in measured.values() for seed in found})
    command = f"python -m tests.results run {name} --seeds {' '.join(map(str, seeds))}"
    return (
        f"{experiment.about}\n\n{table(experiment, arms, measured)}\n\n"
        "Mean over the seeds, with the 95 % interval of Student's t in parentheses. Made by:\n\n"
        f"```\n{command}\n```\n"
    )


def written(page: str, name: str, text: str) -> str:
    """The page with the section `name` made again. Raises ValueError if the page has no place for it."""
    begin, end = f"<!-- results: {name} -->\n", f"<!-- end of {name} -->\n"
    place = re.compile(f"(?<={re.escape(begin)}).*?(?={re.escape(end)})", flags=re.DOTALL)
    if len(place.findall(page)) != 1:
        raise ValueError(f"the page has no place for {name}; add the lines {begin.strip()} and {end.strip()}")
    return place.sub(lambda _: f"\n{text}\n", page)
