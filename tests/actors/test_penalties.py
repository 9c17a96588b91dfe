"""Penalties on hand-made answers."""

from __future__ import annotations

import pytest

from actors.penalties import length, repetition, unfinished
from common.types import RewardInput


def answer(response: str = "", tokens: int = 0, finish_reason: str = "stop") -> RewardInput:
    return RewardInput("q", response, tokens, finish_reason, {})


def test_only_a_response_without_its_end_token_is_unfinished():
    assert unfinished(answer(finish_reason="stop")) == 0.0
    assert unfinished(answer(finish_reason="length")) == 1.0
    assert unfinished(answer(finish_reason="terminated")) == 0.0
    assert [unfinished(answer(finish_reason=f"max_{limit}")) for limit in ("turns", "tokens")] == [1.0, 1.0]


def test_length_counts_tokens_not_words():
    assert length(answer("two words", tokens=5)) == 5.0


@pytest.mark.parametrize(
    ("response", "share"),
    [
        ("", 0.0),
        ("too short", 0.0),
        ("a b c d e", 0.0),  # abc bcd cde
        ("a b c a b c", 0.25),  # abc bca cab abc: one of four was there before
        ("No no no NO", 0.5),  # nnn nnn, whatever the case
    ],
)
def test_repetition_is_the_share_of_repeated_trigrams(response, share):
    assert repetition(answer(response)) == pytest.approx(share)
