"""The contexts and sequences of a row of the journal, place by place: what slow derivations in tests are made of."""

from __future__ import annotations

from typing import Any


def sampled_places(row: dict[str, Any]) -> list[int]:
    """Places of a response whose tokens are not an environment's."""
    others = {place for turn in row["turns"] or () for place in range(turn["end"], turn["next_start"])}
    return [place for place in range(len(row["response_ids"])) if place not in others]


def contexts_of(row: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Each context of a row: its tokens, prompt first, and the places in it of those that the policy sampled."""
    starts = {turn["end"] for turn in row["turns"] or () if turn["new_context"]}
    sampled = sampled_places(row)
    found: list[tuple[list[int], list[int]]] = [(list(row["prompt_ids"]), [])]
    for place, token in enumerate(row["response_ids"]):
        if place in starts:
            found.append(([], []))
        ids, places = found[-1]
        if place in sampled:
            places.append(len(ids))
        ids.append(token)
    return found


def ends_of(row: dict[str, Any]) -> set[int]:
    """The last token of each sequence, as its number among the sampled ones."""
    places = sampled_places(row)
    closing = [turn["end"] for turn in row["turns"] or () if turn["ends"]] + [len(row["response_ids"])]
    return {sum(place < end for place in places) - 1 for end in closing} - {-1}
