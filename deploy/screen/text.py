"""Numbers and times as short text. Runs in the driver."""

from __future__ import annotations

import math


def short(value: float, width: int = 6) -> str:
    """A number in `width` characters, with up to two decimals."""
    for form in (".2f", ".1f", ".0f"):
        if len(text := f"{value:{form}}") <= width:
            return text
    return f"{value:.0e}"


def share(value: float) -> str:
    """A share of at most 1 in at most five characters. Far below 0 the exact number means nothing."""
    return "<-9" if value < -9.99 else f"{value:z.2f}"  # z: a value that rounds to 0 is not shown as -0.00


def duration(seconds: float) -> str:
    """Seconds in at most five characters: 42s, 17m, 3h05, 12d."""
    if not math.isfinite(seconds):
        return "?"
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f}s"
    if minutes < 100:
        return f"{minutes}m"
    if minutes < 48 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}"
    return f"{seconds / 86400:.0f}d"


def significant(value: float, digits: int = 4) -> str:
    """A number with this many significant digits, without trailing zeros."""
    return f"{value:.{digits}g}"
