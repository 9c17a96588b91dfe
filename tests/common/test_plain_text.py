"""Text from outside becomes text that a message may have."""

from __future__ import annotations

import pytest

from common.plain_text import without_surrogates


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", "plain"),
        ("Grüezi \U0001f600", "Grüezi \U0001f600"),
        ("\ufeffa", "\ufeffa"),  # a mark of the byte order is a character, too
        ("a\ud83db", "a\ufffdb"),
        ("\ude00\ud83d", "\ufffd\ufffd"),  # halves in the wrong order
        ("\ud83d\ude00", "\U0001f600"),
        ("\ud83d\ud83d\ude00", "\ufffd\U0001f600"),
    ],
)
def test_only_halves_of_surrogate_pairs_change(text, expected):
    assert without_surrogates(text) == expected
    expected.encode()
