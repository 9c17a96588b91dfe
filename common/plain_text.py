"""Repairs text from outside, such as a service's answer or a tool's, so that a message may have it. Runs anywhere."""

from __future__ import annotations


def without_surrogates(text: str) -> str:
    """The text with halves of surrogate pairs replaced, which are in no text that can be encoded. Two halves that
    belong together become their character, and other ones U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def one_line(text: str, limit: int = 500) -> str:
    """The text on one line of at most `limit` characters. Unprintable characters, such as control characters and halves
    of surrogate pairs, become escapes."""
    text = " ".join(text[: 4 * limit].split())
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return shown if len(shown) <= limit else shown[: limit - 3] + "..."
