"""The plots of an evaluation, as PNG files in its run directory. Runs in the driver."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.files import replaced_file

PASS_AT_K = "pass-at-k.png"


def plot_pass_at_k(record: Mapping[str, Any], directory: Path) -> Path | None:
    """pass@k of every policy over k with 95 % intervals. For each crossover with the base, asked once: the height of
    pass@1, the k, and its interval. None if nothing says what passes."""
    policies = {name: figures for name, figures in record["policies"].items() if "pass_at_k" in figures}
    if not policies:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    samples = record["samples"]
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    ks = range(1, samples + 1)
    for name, figures in policies.items():
        values = [one["value"] for one in figures["pass_at_k"]]
        lows, highs = zip(*(one["interval"] for one in figures["pass_at_k"]), strict=True)
        [line] = axes.plot(ks, values, label=name, marker="o" if samples == 1 else None)
        axes.fill_between(ks, lows, highs, color=line.get_color(), alpha=0.15, linewidth=0)
        found = figures.get("crossover")
        if found is not None and found["value"] is not None:
            low, high = (samples if k is None else k for k in found["interval"])
            height, k = values[0], found["value"]
            axes.hlines(height, 1, k, color=line.get_color(), linestyle="--", linewidth=1)
            label = f"k = {k}: the base, asked k times, beats {name}, asked once"
            axes.errorbar(
                k, height, xerr=[[k - low], [high - k]], color=line.get_color(), marker="D", capsize=4, label=label
            )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(
        xlabel="k: answers to each prompt",
        ylabel="pass@k: at least one of them passes",
        title=f"{record['prompts']} held-out prompts, {samples} answer(s) to each; 95 % intervals",
        ylim=(-0.02, 1.02),
    )
    axes.legend(loc="lower right", fontsize="small")
    target = directory / PASS_AT_K
    with replaced_file(target) as staging:
        figure.savefig(staging, dpi=120, format="png")
    pyplot.close(figure)
    return target
