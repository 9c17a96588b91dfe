"""The figures of evaluation.json as rows of text, for the screen and for the report. Runs anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from deploy.evaluation.figure_text import Figures, number_text, percent_text
from deploy.evaluation.forgetting_rows import forgetting_rows

Row = tuple[str, Sequence[str]]  # what it shows, and the text of each policy: "" if there is none


def figure_rows(record: Mapping[str, Any]) -> list[Row]:
    """One row for each figure that at least one policy has."""
    policies: Sequence[Figures] = list(record["policies"].values())
    rows: list[Row] = []

    def row(label: str, cell: Callable[[Figures], str]) -> None:
        rows.append((label, [cell(figures) for figures in policies]))

    for k in shown_k(record["samples"]):
        row(f"pass@{k}, %", partial(_pass_text, k))
    row("score", lambda figures: number_text(figures["score"], ".3f"))
    for source in dict.fromkeys(source for figures in policies for source in figures["components"]):
        row(f"  {source}", partial(_component_text, source))
    row("KL, nats", lambda figures: number_text(figures["kl_per_response"], ".2f"))
    row("tokens", lambda figures: number_text(figures["response_tokens"], ".1f"))
    row("cut off, %", lambda figures: percent_text(figures["cut_off"]))
    for label, text in forgetting_rows(policies):
        row(label, text)
    row("without a score", lambda figures: str(figures["voids"] or ""))
    for judge in dict.fromkeys(judge for figures in policies for judge in figures.get("judges", {})):
        row(f"  of {judge} alone", partial(_judge_voids_text, judge))
    return [(label, cells) for label, cells in rows if any(cells)]


def _pass_text(k: int, figures: Figures) -> str:
    return percent_text(figures["pass_at_k"][k - 1]) if "pass_at_k" in figures else ""


def _component_text(source: str, figures: Figures) -> str:
    return number_text(figures["components"].get(source), ".3f")


def _judge_voids_text(judge: str, figures: Figures) -> str:
    return str(figures.get("judges", {}).get(judge, {}).get("voids") or "")


def shown_k(samples: int) -> list[int]:
    """The k of a short table: 1, 2, 4, ... and the number of samples."""
    return sorted({*(1 << n for n in range(samples.bit_length())), samples})


def crossover_lines(record: Mapping[str, Any]) -> list[str]:
    """Two sentences for each policy that is compared with the base."""
    lines = []
    for name, figures in record["policies"].items():
        if "crossover" in figures:
            once, equal = crossover_text(figures["crossover"]), crossover_text(figures["crossover_equal"])
            lines.append(f"The base, asked k times, beats {name}, asked once: {once}")
            lines.append(f"The base beats {name} if both are asked k times: {equal}")
    return lines


def crossover_text(found: Mapping[str, Any]) -> str:
    """Such as "from k = 5 on (95 % interval 4 to 7; in 100.0% of the resamples)", or "no crossover up to k = 128 (3.0%
    of the resamples have one, from k = 60 on)"."""
    none = f"none up to {found['up_to']}"
    share = f"{found['share']:.1%} of the resamples"
    if found["value"] is None:
        earliest = "" if found["interval"][0] is None else f", from k = {found['interval'][0]} on"
        return f"no crossover up to k = {found['up_to']} ({share} have one{earliest})"
    low, high = (none if k is None else str(k) for k in found["interval"])
    return f"from k = {found['value']} on (95 % interval {low} to {high}; in {share})"
