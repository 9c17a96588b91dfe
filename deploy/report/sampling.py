"""Which rollouts the page has room for. Runs anywhere.

The table has every rollout of a run of up to MAX_ROWS. Their texts and token numbers are larger, and have a budget of
bytes. If it is too small for all, they are kept in this order:

    1. void and extreme rollouts, then those with clipped tokens, the largest share first, until 60 % of the budget
    2. the first and the last rollout of each prompt, in an order given by a hash of the prompt's number, until 80 %
    3. the other rollouts, in an order given by a hash of the sample id, until 100 %

Extreme: the highest and lowest score, the largest KL, the most tokens and the largest share of clipped tokens among
the rollouts of each of WINDOWS equal parts of the run.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MAX_ROWS = 100_000
WINDOWS = 100
BUDGET = 12_000_000  # bytes of texts and token numbers
ALWAYS, PAIRS, ALL = 0.6, 0.8, 1.0  # shares of the budget at which parts 1, 2 and 3 end


@dataclass(frozen=True)
class Facts:
    """The numbers that decide which rollouts are kept. Arrays have one item for each rollout, in the journal's order.
    An unknown number is NaN."""

    step: np.ndarray
    ids: Sequence[str]  # sample ids
    score: np.ndarray
    tokens: np.ndarray
    kl: np.ndarray
    clipped: np.ndarray  # share of its tokens
    void: np.ndarray  # bool
    size: np.ndarray  # bytes of its text and token numbers in the page, without the shared prompt
    shared: Sequence[str | None]  # the number of its prompt if the page has this text once for all, else None
    prompt_size: Mapping[str, int]  # bytes of each shared prompt, by number

    def __len__(self) -> int:
        return len(self.ids)


def extremes(facts: Facts) -> list[int]:
    """The extreme rollouts of each window, in order."""
    if not len(facts):
        return []
    last = int(facts.step.max())
    window = facts.step * WINDOWS // (last + 1) if last >= WINDOWS else facts.step
    measures = (facts.score, -facts.score, facts.kl, facts.tokens.astype(float), facts.clipped)
    starts = np.flatnonzero(np.diff(window, prepend=-1))
    chosen = set()
    for begin, end in zip(starts, [*starts[1:], len(facts)]):
        for measure in measures:
            part = np.where(facts.void[begin:end], np.nan, measure[begin:end])
            if not np.isnan(part).all():
                chosen.add(int(begin + np.nanargmax(part)))
    return sorted(chosen)


def rows_kept(facts: Facts, limit: int = MAX_ROWS) -> list[int]:
    """The rollouts in the table."""
    if len(facts) <= limit:
        return list(range(len(facts)))
    order = dict.fromkeys([*_always(facts), *sorted(range(len(facts)), key=lambda i: _hash(facts.ids[i]))])
    return sorted(list(order)[:limit])


def details_kept(facts: Facts, rows: Iterable[int], budget: int = BUDGET) -> list[int]:
    """The rollouts of the table whose text and token numbers the page has."""
    rows = list(rows)
    prompts = {number for i in rows if (number := facts.shared[i]) is not None}
    if facts.size[rows].sum() + sum(facts.prompt_size[number] for number in prompts) <= budget:
        return rows
    inside = set(rows)
    kept: dict[int, None] = {}
    paid: set[str | None] = set()  # shared prompts that the page has already
    spent = 0.0
    parts = ((_always(facts), ALWAYS), (_pairs(facts, rows), PAIRS), (_drawn(facts, rows), ALL))
    for candidates, share in parts:
        for i in candidates:
            if i in kept or i not in inside:
                continue
            number = facts.shared[i]
            size = facts.size[i] + (0 if number is None or number in paid else facts.prompt_size[number])
            if spent + size <= share * budget:
                kept[i] = None
                paid.add(number)
                spent += size
    return sorted(kept)


def _always(facts: Facts) -> list[int]:
    clipped = np.nan_to_num(facts.clipped)
    most_clipped = np.argsort(-clipped, kind="stable")
    first = [*np.flatnonzero(facts.void).tolist(), *extremes(facts)]
    return list(dict.fromkeys([*first, *(int(i) for i in most_clipped if clipped[i] > 0)]))


def _pairs(facts: Facts, rows: Sequence[int]) -> Iterator[int]:
    """The first and the last rollout of each prompt, prompt by prompt."""
    asked: dict[str, list[int]] = {}
    for i in rows:
        if not facts.void[i]:
            asked.setdefault(prompt_of(facts.ids[i]), []).append(i)
    for prompt in sorted(asked, key=_hash):
        yield from dict.fromkeys((asked[prompt][0], asked[prompt][-1]))


def _drawn(facts: Facts, rows: Sequence[int]) -> list[int]:
    return sorted(rows, key=lambda i: _hash(facts.ids[i]))


def prompt_of(sample_id: str) -> str:
    """The number of the prompt in a sample id (epoch/prompt/replica)."""
    return sample_id.split("/")[1]


def _hash(name: str) -> int:
    """A hash: a number that looks random but depends only on the name, so the same run gives the same page."""
    return zlib.crc32(name.encode())
