"""The variance account on the screen. Runs in the driver."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from deploy.screen.text import share
from deploy.variance.record import advantages_used
from learner.ppo.critic_quality import PARTS

_LEGEND = (  # each at most 80 columns
    "var: variance of the advantages before whitening, divided by that of the returns",
    "error: standard error of the gradient of the {used} advantages, divided by its",
    "    norm, with its interval; near 1 the gradient is mostly noise",
    "noise scale: responses at which the error equals the true gradient; interval",
    "/none: noise scale divided by that without a baseline; below 1 the estimator is",
    "    better; cosine: of its true gradient with that of lam 1, which has no bias",
    "*: the run's own estimator; -: the batch is too small to tell",
)


def account_text(account: Mapping[str, Any]) -> Iterator[Table | str]:
    """Tables and sentences, each at most 80 columns wide."""
    batches, gradients = account["batches"], account["gradients"]
    which = f"step {batches[0]}" if len(batches) == 1 else f"steps {batches[0]} to {batches[-1]}"
    yield (
        f"policy and critic after {account['step']} updates; batch of {which}: {account['responses']:,} responses to "
        f"{account['prompts']:,} prompts, {account['tokens']:,} tokens"
    )
    yield _estimators(account)
    yield "\n".join(_LEGEND).format(used=advantages_used(account))
    for name, reason in account["left_out"].items():
        yield escape(f"{name} is left out: {reason}")
    if account["explained_variance"]:
        yield _explained(account["explained_variance"])
    kept = gradients["kept"]
    how = "exact" if kept == gradients["weights"] else f"each gradient kept as {kept:,} numbers"
    yield (
        f"gradients of {gradients['weights']:,} weights, from {gradients['parts']} parts of the batch; inner products: "
        f"{how}"
    )


def _estimators(account: Mapping[str, Any]) -> Table:
    table = _table("advantages", "var", "error", "interval", "noise scale", "/none", "cosine")
    for name, figures in account["estimators"].items():
        noise = figures[advantages_used(account)]
        error, against, direction = noise["relative_standard_error"], noise["against_none"], noise.get("direction")
        table.add_row(
            escape(name) + (" *" if figures["is_runs_own"] else ""),
            _value(figures["of_returns"]),
            _value(error),
            _interval(error),
            _scale(noise["noise_scale"]),
            _value(against) if against and against["interval"] else "-",
            _value(direction) if direction and direction["interval"] else "-",
        )
    return table


def _explained(parts: Mapping[str, Any]) -> Table:
    table = _table("explained by the critic", "share", "interval", "var(R)")
    for name, title in PARTS.items():
        found = parts[name]
        share = found["explained_variance"]
        table.add_row(title, _value(share), _interval(share), _value(found["returns_variance"], "z.3g"))
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="")
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def _value(figure: Mapping[str, Any] | None, form: str = "z.2f") -> str:
    """z: a value that rounds to 0 is not shown as -0."""
    return "-" if figure is None else format(figure["value"], form)


def _interval(figure: Mapping[str, Any] | None) -> str:
    if figure is None or figure["interval"] is None:
        return "-"
    low, high = map(share, figure["interval"])
    return f"{low} to {high}"


def _scale(figure: Mapping[str, Any] | None) -> str:
    """The interval alone, because the value without it would look exact."""
    if figure is None or figure["interval"] is None:
        return "-"
    low, high = figure["interval"]
    return f"> {low:,.0f}" if high is None else f"{low:,.0f} to {high:,.0f}"
