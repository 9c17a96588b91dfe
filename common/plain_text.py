"""Shortens text from outside, such as a service's answer, so that a message may show it. Runs anywhere."""

from __future__ import annotations


def one_line(text: str, limit: int = 500) -> str:
    """The text on one line of at most `limit` characters. Unprintable characters, such as control characters and halves
    of surrogate pairs, become escapes."""
    text = " ".join(text[: 4 * limit].split())
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
