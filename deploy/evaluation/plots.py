"""The plots of an evaluation, as PNG files in its run directory. Runs in the driver."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from deploy.plot_file import plot_file

PASS_AT_K, KL, JUDGES = "pass-at-k.png", "kl-by-position.png", "reward-and-judges.png"

Record = Mapping[str, Any]  # of evaluation.json
Point = tuple[Mapping[str, Any], Mapping[str, Any]]  # the score of training, and that of a judge


def write_plots(record: Record, directory: Path) -> list[Path]:
    """Writes every plot that there are figures for. Returns the files."""
    drawn = (draw(record, directory) for draw in (plot_pass_at_k, plot_kl_by_position, plot_judges))
    return [path for path in drawn if path is not None]


def plot_pass_at_k(record: Record, directory: Path) -> Path | None:
    """pass@k of every policy over k with 95 % intervals. Marks each crossover: the k from which the base beats the
    policy's pass@1, with its interval. None if the record has no pass@k."""
    policies = {name: figures for name, figures in record["policies"].items() if "pass_at_k" in figures}
    if not policies:
        return None
    samples = record["samples"]
    with _plot(directory / PASS_AT_K) as [axes]:
        ks = range(1, samples + 1)
        for name, figures in policies.items():
            values = [one["value"] for one in figures["pass_at_k"]]
            lows, highs = zip(*(one["interval"] for one in figures["pass_at_k"]), strict=True)
            [line] = axes.plot(ks, values, label=name, marker="o" if samples == 1 else None)
            axes.fill_between(ks, lows, highs, color=line.get_color(), alpha=0.15, linewidth=0)
            found = figures.get("crossover")
            if found is not None and found["value"] is not None:
                low, high = (samples if k is None else k for k in found["interval"])
                height, k, colour = values[0], found["value"], line.get_color()
                axes.hlines(height, 1, k, color=colour, linestyle="--", linewidth=1)
                label = f"k = {k}: the base, asked k times, beats {name}, asked once"
                reach = [[k - low], [high - k]]
                axes.errorbar(k, height, xerr=reach, color=colour, marker="D", capsize=4, label=label)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(
            xlabel="k: answers to each prompt",
            ylabel="pass@k: at least one of them passes",
            title=f"{record['prompts']} held-out prompts, {samples} answer(s) to each; 95 % intervals",
            ylim=(-0.02, 1.02),
        )
        axes.legend(loc="lower right", fontsize="small")
    return directory / PASS_AT_K


def plot_kl_by_position(record: Record, directory: Path) -> Path | None:
    """KL from the base over the position in the answer, with 95 % intervals where there are any. None if no answer has
    a score."""
    found = {name: figures["kl_by_position"] for name, figures in record["policies"].items()}
    policies = {name: parts for name, parts in found.items() if parts}
    if not policies:
        return None
    with _plot(directory / KL) as [axes]:
        for name, parts in policies.items():
            places = [1 + (part["first"] + part["last"]) / 2 for part in parts]
            [line] = axes.plot(places, [part["value"] for part in parts], label=name, marker=".")
            lows, highs = ([_ends(part)[end] for part in parts] for end in (0, 1))
            axes.fill_between(places, lows, highs, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(
            xlabel="token of the answer, from 1",
            ylabel="KL from the base, nats per token",
            title="mean over the answers that reach the token; 95 % intervals",
        )
        axes.legend(fontsize="small")
    return directory / KL


def plot_judges(record: Record, directory: Path) -> Path | None:
    """One plot for each judge. Each policy is a point: x is the mean training score, y the judge's mean score, both
    with 95 % intervals. A line leads to it from the base. None without judges."""
    judges: dict[str, dict[str, Point]] = {}
    for name, figures in record["policies"].items():
        for judge, found in figures["judges"].items():
            if figures["score"]["value"] is not None and found["score"]["value"] is not None:
                judges.setdefault(judge, {})[name] = (figures["score"], found["score"])
    if not judges:
        return None
    with _plot(directory / JUDGES, len(judges)) as all_axes:
        for axes, (judge, points) in zip(all_axes, judges.items(), strict=True):
            base = points.get(record["base"])
            for name, (x, y) in points.items():
                place = (x["value"], y["value"])
                drawn = axes.errorbar(*place, xerr=_reach(x), yerr=_reach(y), label=name, marker="o", capsize=3)
                if base is not None and name != record["base"]:
                    line = zip((base[0]["value"], base[1]["value"]), place, strict=True)
                    axes.plot(*line, color=drawn[0].get_color(), linestyle=":", linewidth=1)
            axes.set(
                xlabel="score: what training maximises",
                ylabel=judge,
                title="right of the base and below it: over-optimised",
            )
            axes.legend(fontsize="small")
    return directory / JUDGES


def _ends(figure: Mapping[str, Any]) -> list[float]:
    """The interval; without one, the value twice."""
    return figure["interval"] or [figure["value"]] * 2


def _reach(figure: Mapping[str, Any]) -> list[list[float]]:
    """The distances of the ends from the value, as error bars take them."""
    low, high = _ends(figure)
    return [[max(0.0, figure["value"] - low)], [max(0.0, high - figure["value"])]]


def _plot(target: Path, count: int = 1) -> AbstractContextManager[Any]:
    return plot_file(target, count, size=(7 * count, 4.5))
