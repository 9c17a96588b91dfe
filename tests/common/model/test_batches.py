"""Groups of sequences under a token budget: worked by hand, their invariants, and the fewest possible groups."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from common.model.batches import packed_batches, token_batches


def test_rows_of_similar_length_share_a_batch():
    # Longest first: 9 alone is over 8; 4 and 4 fill 2 x 4; 3 and 1 take 2 x 3, and a third row would take 9.
    assert token_batches([3, 9, 1, 4, 4, 1], 8) == [[1], [3, 4], [0, 2], [5]]
    assert token_batches([], 8) == []


@pytest.mark.parametrize("max_tokens", [1, 7, 40, 64, 10_000])
def test_every_row_is_in_one_batch_within_the_budget(max_tokens):
    rng = np.random.default_rng(max_tokens)
    for _ in range(20):
        lengths = rng.integers(0, 50, size=rng.integers(1, 30)).tolist()
        batches = token_batches(lengths, max_tokens)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens
        assert len(batches) == 1 or max_tokens < 10_000  # 29 rows of 49 tokens fit


def test_packed_groups_worked_by_hand():
    # The 9 is over the budget alone; both 4s fill a group; the 3 takes the rest.
    assert packed_batches([3, 9, 1, 4, 4, 1], 8) == [[1], [3, 4], [0, 2, 5]]
    # Next to the 5 there is room for 3: the 4 does not fit, the 2 does.
    assert packed_batches([2, 4, 5], 8) == [[2, 0], [1]]
    assert packed_batches([2, 2, 2, 2], 4) == [[0, 1], [2, 3]]
    assert packed_batches([5], 8) == [[0]]
    assert packed_batches([100, 100], 8) == [[0], [1]]
    assert packed_batches([], 8) == []


def cases() -> Iterator[tuple[list[int], int]]:
    rng = np.random.default_rng(0)
    for max_tokens in (1, 7, 40, 64, 200, 10_000):
        for _ in range(20):
            yield rng.integers(1, 50, size=rng.integers(1, 30)).tolist(), max_tokens


def test_every_sequence_is_in_one_packed_group_within_the_budget():
    for lengths, max_tokens in cases():
        groups = packed_batches(lengths, max_tokens)
        assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
        for group in groups:
            inside = [lengths[i] for i in group]
            assert inside == sorted(inside, reverse=True)
            assert sum(inside) <= max_tokens or len(inside) == 1
            assert inside
        assert packed_batches(lengths, max_tokens) == groups


def test_no_packed_group_has_room_for_a_sequence_of_a_later_one():
    for lengths, max_tokens in cases():
        groups = packed_batches(lengths, max_tokens)
        for place, group in enumerate(groups):
            filled = sum(lengths[i] for i in group)
            assert all(filled + lengths[i] > max_tokens for later in groups[place + 1 :] for i in later)


def fewest_groups(lengths: list[int], max_tokens: int) -> int:
    """By exhaustive search: each sequence joins every group with room in turn, or starts a new one."""
    best = len(lengths)

    def place(rest: list[int], filled: tuple[int, ...]) -> None:
        nonlocal best
        if len(filled) >= best and rest:
            return
        if not rest:
            best = min(best, len(filled))
            return
        for i, total in enumerate(filled):
            if total + rest[0] <= max_tokens and total not in filled[:i]:
                place(rest[1:], (*filled[:i], total + rest[0], *filled[i + 1 :]))
        place(rest[1:], (*filled, rest[0]))

    place(sorted(lengths, reverse=True), ())
    return best


def test_packing_rarely_makes_a_group_more_than_needed():
    rng, more = np.random.default_rng(1), Counter()
    for _ in range(200):
        lengths = rng.integers(1, 30, size=rng.integers(1, 9)).tolist()
        more[len(packed_batches(lengths, 40)) - fewest_groups(lengths, 40)] += 1
    assert set(more) <= {0, 1}
    assert more[1] <= 10


def test_many_short_sequences_fill_their_groups():
    lengths = np.random.default_rng(2).integers(16, 129, size=200).tolist()
    groups = packed_batches(lengths, 2048)
    assert len(groups) == math.ceil(sum(lengths) / 2048)
