"""Turns the result of a user's function into a score and figures, or an error. Runs anywhere. Imports only the standard
library."""

from __future__ import annotations

import decimal
import inspect
import math
import numbers
import re
from collections.abc import Iterator
from typing import Any, TypeAlias

from .errors import UserCodeError

Result: TypeAlias = tuple[float, dict[str, float]]  # score and figures of one answer
Outcome: TypeAlias = "Result | UserCodeError"  # of one answer
MAX_FIGURES = 32  # most numbers that a result may have in addition to its score
FLOAT32_MAX = 3.4028234663852886e38  # the learner computes in float32
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


def read_results(returned: Any, count: int) -> list[Outcome]:
    """The outcome of each of `count` answers, from the list that a function returned. Raises UserCodeError unless it is
    a list of this length."""
    listed = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(listed, (list, tuple)):
        raise UserCodeError(
            f"takes a list of answers, but returned {kind_of_value(returned)} instead of a list of scores"
        )
    if len(listed) != count:
        raise UserCodeError(
            f"returned {len(listed)} scores for {count} answers; return one for each, in the same order",
            fault="returned a different number of scores than answers",
        )
    return [read_result(item) for item in listed]


def read_result(returned: Any) -> Outcome:
    """The outcome of one answer. A result is a number, or a dict with the number under "score" and further figures."""
    try:
        if not isinstance(returned, dict):
            return _score(returned), {}
        if "score" not in returned:
            keys = ", ".join(repr(key)[:40] for key in list(returned)[:10]) or "none"
            raise UserCodeError(f'returned a dict without "score" (its keys: {keys})')
        return _score(returned["score"]), dict(_figures(returned))
    except UserCodeError as error:
        return error


def _score(value: Any) -> float:
    """A finite number. Text and true/false are refused, although Python's float() would accept them."""
    score = as_number(value)
    if score is None:
        raise UserCodeError(
            f"returned {kind_of_value(value)} where a number is needed", fault=f"returned {type(value)}"
        )
    if not math.isfinite(score):
        raise UserCodeError(f"returned {score}", permanent=False)
    if abs(score) > FLOAT32_MAX:
        raise UserCodeError(
            f"returned {score:g}, which float32 cannot hold",
            fault="returned a number that float32 cannot hold",
            permanent=False,
        )
    return score


def as_number(value: Any) -> float | None:
    """A number, a numpy scalar, or an array or tensor of one element, as a float. None if it is none of these."""
    if callable(getattr(value, "item", None)):
        try:
            value = value.item()
        except Exception:  # it has several elements, or is another kind of object that has a method of this name
            return None
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, decimal.Decimal)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except ValueError:  # Decimal("sNaN")
        return math.nan


def _figures(returned: dict[Any, Any]) -> Iterator[tuple[str, float]]:
    """The figures of a result. True and False count as 1 and 0; None and numbers that are not finite are left out."""
    if len(returned) > MAX_FIGURES + 1:
        raise UserCodeError(
            f"returned a dict of {len(returned)} keys; it may have score and at most {MAX_FIGURES} figures"
        )
    for key, value in returned.items():
        if key == "score" or value is None:
            continue
        if not isinstance(key, str) or not _NAME.fullmatch(key):
            raise UserCodeError(
                f"returned a dict with the key {str(key)[:80]!r}; a figure's name begins with a letter and has at most "
                "64 letters, digits, _ and -"
            )
        figure = float(value) if isinstance(value, bool) else as_number(value)
        if figure is None:
            raise UserCodeError(f"returned {kind_of_value(value)} for {key!r} where a number is needed")
        if math.isfinite(figure):
            yield key, figure


def kind_of_value(value: Any) -> str:
    if value is None:
        return "None"
    if inspect.iscoroutine(value):
        value.close()
        return "a coroutine (declare the function itself with async def)"
    text = repr(value) if isinstance(value, (str, bytes, bool, int)) else ""
    return f"{text[:80]} ({type(value).__name__})" if text else f"a {type(value).__name__}"
