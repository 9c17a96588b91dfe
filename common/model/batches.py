"""Groups sequences into forward passes, under a token budget. Runs anywhere."""

from __future__ import annotations

from collections.abc import Sequence


def token_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Groups the indices of rows so that no group has more than `max_tokens` when padded to its longest row.

    Rows of similar length share a group, so there is little padding. A row longer than the budget is a group of its
    own.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # The first of a group is its longest.
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def packed_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Groups the indices of sequences into few groups of at most `max_tokens` each, with similar lengths together.

    Each group takes the longest sequence left, and then repeatedly the longest one that still fits. A sequence longer
    than the budget is a group of its own.
    """
    left = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    while left:
        group, rest, room = [left[0]], [], max_tokens - lengths[left[0]]
        for index in left[1:]:
            if lengths[index] <= room:
                group.append(index)
                room -= lengths[index]
            else:
                rest.append(index)
        groups.append(group)
        left = rest
    return groups
