"""Text from outside, such as a service's answer or an error's message, made fit for a message of ours."""

from __future__ import annotations


def one_line(text: str, limit: int = 500) -> str:
    """At most `limit` characters in one line. Characters that do not print, such as control characters and halves of
    surrogate pairs, are written as escapes."""
    text = " ".join(text[: 4 * limit].split())
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
