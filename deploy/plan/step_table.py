"""The tables of `ratchet plan` about a step: seconds of its phases, and bytes that it moves. Runs in the driver."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table

from deploy.plan.seconds import Phase, StepSeconds
from deploy.plan.traffic import Flow


def seconds_tables(found: StepSeconds) -> list[RenderableType]:
    """A row for each phase, and where the rates come from."""
    lengths = found.lengths
    table = Table(
        title=f"Seconds of a step, with {lengths.prompt:g} + {lengths.response:g} tokens in each rollout",
        title_justify="left",
        title_style="bold",
        pad_edge=False,
    )
    table.add_column("phase")
    table.add_column("seconds", justify="right", no_wrap=True)
    table.add_column("")
    for phase in found.phases:
        table.add_row(f"  {phase.name}" if phase.part else phase.name, _number(phase), phase.detail)
    table.add_section()
    table.add_row("[bold]a step[/]", f"[bold]{_number(found.step)}[/]", found.step.detail)
    return [table, *(f"Rates of {origin}" for origin in found.origins)]


def _number(phase: Phase) -> str:
    if phase.seconds is None:
        return ""
    digits = f"{phase.seconds:,.0f}" if phase.seconds >= 100 else f"{phase.seconds:.2g}"
    return f"{'at least' if phase.at_least else 'about'} {digits}"


def traffic_table(flows: Sequence[Flow]) -> Table:
    """A row for each kind of data, in bytes for people."""
    table = Table(title="Data of a step", title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("")
    table.add_column("into object stores", justify="right")
    table.add_column("between nodes, at most", justify="right")
    table.add_column("")
    for flow in flows:
        table.add_row(flow.what, _bytes(flow.stores), _bytes(flow.between), flow.detail)
    table.add_section()
    table.add_row("[bold]in all[/]", _bytes(sum(f.stores for f in flows)), _bytes(sum(f.between for f in flows)), "")
    return table


def _bytes(count: float) -> str:
    """Decimal units, as is usual for networks."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B" if count else ""
