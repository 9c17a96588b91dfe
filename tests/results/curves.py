"""The curves of docs/results.md: held-out pass@1 after each number of responses, for each arm of an experiment.

A line is the mean over the seeds; its band is the 95 % interval of Student's t.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from tests.results.finished import Finished
from tests.results.measured import finished_runs
from tests.results.tables import interval
from tests.results.works import Arm

Point = tuple[float, float, tuple[float, float]]  # responses, mean over the seeds, interval


def curve(runs: Sequence[Finished]) -> list[Point]:
    """The points that all runs have. One run alone has the interval of zero width."""
    rates: dict[float, list[float]] = defaultdict(list)
    for run in runs:
        for evaluation in run.evaluations:
            responses = evaluation["policy_version"] * run.config["rollouts_per_step"]
            rates[responses].append(evaluation["pass_at_1"])
    whole = {responses: found for responses, found in sorted(rates.items()) if len(found) == len(runs)}
    means = {responses: sum(found) / len(found) for responses, found in whole.items()}
    return [(at, means[at], interval(found) or (means[at], means[at])) for at, found in whole.items()]


def plot(arms: Sequence[Arm], root: Path, seeds: Sequence[int], target: Path) -> None:
    """Draws the arms that have finished runs. Raises ValueError if there is none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for arm in arms:
        runs = [Finished(path) for path in finished_runs(arm.work, root, seeds).values()]
        if not runs:
            continue
        responses, means, intervals = zip(*curve(runs), strict=True)
        [line] = axes.plot(responses, means, marker="o", markersize=3, label=f"{arm.title} ({len(runs)} seeds)")
        lows, highs = zip(*intervals, strict=True)
        axes.fill_between(responses, lows, highs, color=line.get_color(), alpha=0.15, linewidth=0)
    if not axes.lines:
        raise ValueError("no arm has a finished run")
    axes.set(
        xlabel="responses that the policy has learned from", ylabel="pass@1 on held-out prompts", ylim=(-0.02, 1.02)
    )
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
