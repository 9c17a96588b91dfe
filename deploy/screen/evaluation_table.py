"""The figures of `ratchet evaluate` on the screen: a table with a column for each policy. Runs in the driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from deploy.screen.progress import evaluation_table
from learner.loop.evaluation import Evaluation

Figures = Mapping[str, Any]  # of one policy, as in evaluation.json


def evaluation_summary(record: Mapping[str, Any]) -> list[Table | str]:
    """What the screen shows at the end of an evaluation."""
    if "reference" in record:  # one answer of one policy to each prompt
        known = {field: record[field] for field in Evaluation.__dataclass_fields__}
        return [evaluation_table({Path(record["policy"]).name: Evaluation.from_record(known)})]
    return [_table(record), *_crossovers(record)]


def _table(record: Mapping[str, Any]) -> Table:
    """One column for each policy; intervals are below their figures."""
    policies: Mapping[str, Figures] = record["policies"]
    title = f"{record['prompts']} held-out prompts, {record['samples']} answer(s) of each policy to each"
    table = Table(title=title, caption="in parentheses: 95 % intervals", title_justify="left", caption_justify="left")
    table.add_column("")
    for name in policies:
        table.add_column(name, justify="right")

    def row(label: str, cell: Callable[[Figures], str]) -> None:
        cells = [cell(figures) for figures in policies.values()]
        if any(cells):
            table.add_row(label, *cells)

    for k in shown_k(record["samples"]):
        row(f"pass@{k}", partial(_pass_at, k))
    row("score", lambda figures: _number(figures["score"], ".3f"))
    for source in dict.fromkeys(source for figures in policies.values() for source in figures["components"]):
        row(f"  {source}", partial(_component, source))
    row("KL from the base, nats", lambda figures: _number(figures["kl_per_response"], ".2f"))
    row("tokens", lambda figures: _number(figures["response_tokens"], ".1f"))
    row("cut off at the longest", lambda figures: _percent(figures["cut_off"]))
    if any(figures["voids"] for figures in policies.values()):
        row("answers without a score", lambda figures: str(figures["voids"]))
    return table


def _pass_at(k: int, figures: Figures) -> str:
    return _percent(figures["pass_at_k"][k - 1]) if "pass_at_k" in figures else ""


def _component(source: str, figures: Figures) -> str:
    return _number(figures["components"].get(source), ".3f")


def shown_k(samples: int) -> list[int]:
    """The k of a short list: 1, 2, 4, ... and the number of samples."""
    return sorted({*(1 << n for n in range(samples.bit_length())), samples})


def _crossovers(record: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, figures in record["policies"].items():
        if (found := figures.get("crossover")) is not None:
            lines.append(f"The base beats {name}, asked once, from k = {crossover_text(found)}")
            lines.append(f"  ... asked as often, from k = {crossover_text(figures['crossover_equal'])}")
    return lines


def crossover_text(found: Mapping[str, Any]) -> str:
    """Such as "5 (4 to 7)"; an open upper end is "none"."""
    none = f"none up to k = {found['up_to']}"
    low, high = (none if k is None else str(k) for k in found["interval"])
    value = none if found["value"] is None else str(found["value"])
    ends = "" if (low, high) == (none, none) else f" ({low} to {high})"
    return f"{value}{ends}; in {found['share']:.0%} of the resamples"


def _number(figure: Figures | None, form: str) -> str:
    """Such as "0.50 (0.25 to 0.75)"."""
    if figure is None or figure["value"] is None:
        return ""
    low, high = figure["interval"]
    return f"{figure['value']:{form}} ({low:{form}} to {high:{form}})"


def _percent(figure: Figures) -> str:
    return _number(figure, ".1%")
