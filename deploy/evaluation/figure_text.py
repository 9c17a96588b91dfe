"""A figure of evaluation.json with its interval, as text. Runs anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Figures = Mapping[str, Any]  # of one policy, as in evaluation.json


def number_text(figure: Figures | None, form: str) -> str:
    """Such as "0.50 (0.25, 0.75)"; "" if there is none."""
    if figure is None or figure["value"] is None:
        return ""
    form = form.replace(".", "z.", 1)  # a value that rounds to 0 is not shown as -0
    if figure["interval"] is None:
        return f"{figure['value']:{form}}"
    low, high = figure["interval"]
    return f"{figure['value']:{form}} ({low:{form}}, {high:{form}})"


def percent_text(figure: Figures | None) -> str:
    """Such as "50.0 (25.0, 75.0)", in percent; "" if there is none."""
    if figure is None or figure["value"] is None:
        return ""
    ends = figure["interval"] and [100 * end for end in figure["interval"]]
    return number_text({"value": 100 * figure["value"], "interval": ends}, ".1f")
