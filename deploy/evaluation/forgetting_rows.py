"""Rows and sentences about what policies have forgotten, for the screen and for the report. Runs anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from deploy.evaluation.figure_text import Figures, number_text, percent_text

_NGRAMS = ("distinct_1", "distinct_2", "distinct_3")


def forgetting_rows(policies: Sequence[Figures]) -> Iterator[tuple[str, Callable[[Figures], str]]]:
    """The label of each row, and its cell for the figures of one policy; "" if the policy has no such figure."""
    for text in _names(policies, "perplexity"):
        yield f"perplexity, {text}", partial(_part_text, "perplexity", text, ".4g")
        yield "  / that of the base", partial(_part_text, "perplexity_ratio", text, ".3f")
    yield "entropy, nats", lambda figures: number_text(figures.get("entropy"), ".3f")
    yield "distinct-1, -2, -3", _distinct_text
    yield "different, %", lambda figures: percent_text(figures.get("different_answers"))
    for judge in _names(policies, "judges"):
        yield f"correlation of score and {judge}", partial(_correlation_text, judge)


def judge_lines(record: Mapping[str, Any]) -> list[str]:
    """A sentence for each policy and judge, if the policy's score is above the base's and the judge's score is
    below."""
    lines = []
    for name, figures in record["policies"].items():
        for judge, found in figures.get("judges", {}).items():
            if found.get("proxy_rose_judge_fell"):
                rose, fell = (number_text(of["change"], "+.3g") for of in (figures["proxy"], found))
                lines.append(
                    f"{name} is over-optimised: compared with the base, its score changed by {rose}, and {judge} by "
                    f"{fell}"
                )
    return lines


def _names(policies: Sequence[Figures], key: str) -> list[str]:
    """The names that a group of figures has in any policy."""
    return list(dict.fromkeys(name for figures in policies for name in figures.get(key, {})))


def _part_text(key: str, name: str, form: str, figures: Figures) -> str:
    return number_text(figures.get(key, {}).get(name), form)


def _distinct_text(figures: Figures) -> str:
    return ", ".join(f"{figures[key]['value']:.2f}" for key in _NGRAMS if key in figures)


def _correlation_text(judge: str, figures: Figures) -> str:
    return number_text(figures.get("judges", {}).get(judge, {}).get("correlation"), ".2f")
