"""RUN/variance.png: variance of the advantages, noise of the gradient, explained variance. Runs in the driver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.plot_file import plot_file
from deploy.variance.record import advantages_used
from learner.ppo.critic_quality import PARTS

LEAST_SHARE = -1.0  # lowest explained variance that is drawn


def plot_account(account: Mapping[str, Any], target: Path) -> None:
    """Draws the account, with intervals of 95 %. The estimator of the run itself is darker."""
    used = advantages_used(account)
    explained = account["explained_variance"]
    names = list(account["estimators"])
    found = [account["estimators"][name] for name in names]
    dark = [one["is_runs_own"] for one in found]
    columns, width = (3, 14) if explained else (2, 9.5)
    with plot_file(target, columns, size=(width, 4)) as axes:
        _bars(axes[0], names, [one["of_returns"] for one in found], dark)
        axes[0].set(
            title="variance of the advantages\n(before whitening)", xlabel="share of the variance of the returns"
        )
        _bars(axes[1], names, [one[used]["relative_standard_error"] for one in found], dark)
        axes[1].axvline(1, color="0.5", linestyle="--", linewidth=1)
        axes[1].set(
            title=f"standard error of the policy gradient\n({used} advantages)",
            xlabel="divided by the norm of the gradient; 1: mostly noise",
        )
        if explained:
            shares = [explained[name]["explained_variance"] for name in PARTS]
            _bars(axes[2], list(PARTS.values()), shares, [True] * len(PARTS))
            axes[2].axvline(0, color="0.5", linewidth=1)
            axes[2].set(
                title="explained variance of the critic\nby position", xlabel="1: perfect; 0: no better than a mean"
            )
            axes[2].set_xlim(left=max(LEAST_SHARE, axes[2].get_xlim()[0]))


def _bars(axes: Any, names: Sequence[str], figures: Sequence[Mapping[str, Any] | None], dark: Sequence[bool]) -> None:
    """Horizontal bars, the first one on top. A figure that is undefined has none."""
    places = [-place for place in range(len(names))]
    values = [0.0 if one is None else one["value"] for one in figures]
    axes.barh(places, values, color=["#0b57c2" if own else "#a9c7ee" for own in dark])
    for place, one in zip(places, figures, strict=True):
        if one is not None and one["interval"] is not None:
            axes.plot(one["interval"], [place, place], color="0.2", linewidth=1.2)
    axes.set_yticks(places, names)
