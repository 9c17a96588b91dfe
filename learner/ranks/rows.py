"""Which rows of a batch go together: the minibatches of an update, each rank's share, and its micro-batches.

Runs in every trainer rank. Each rank computes the whole plan from the same numbers, so the ranks agree on it without
communication.

A minibatch is what one optimizer step learns from. It is divided among the ranks by cost, and each rank divides its
share into micro-batches: the rows of one forward and backward pass, under a token budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from common.model.packing import Sequences
from common.model.size import ModelSize, forward_operations


def minibatches(count: int, *, epochs: int, parts: int, seed: int, step: int, first: int = 0) -> Iterator[np.ndarray]:
    """Yields all `count` rows once in every epoch, in `parts` parts. The order depends on seed, step and epoch alone;
    the epochs are counted from `first`.

    The parts have equal size, except after a void in a batch of whole groups: then some have one row less.
    """
    for epoch in range(first, first + epochs):
        order = np.random.default_rng([seed, step, epoch]).permutation(count)
        yield from (part for part in np.array_split(order, parts) if len(part))


def shares(costs: Sequence[int], world: int) -> list[list[int]]:
    """Assigns every row to one of `world` ranks: costliest first, each to the least loaded rank so far (LPT).

    Returns one sorted list of rows per rank.
    """
    loads, rows = [0] * world, [[] for _ in range(world)]  # type: tuple[list[int], list[list[int]]]
    for row in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least_loaded = loads.index(min(loads))
        loads[least_loaded] += costs[row]
        rows[least_loaded].append(row)
    return [sorted(share) for share in rows]


def micro_batches(
    costs: Sequence[int],
    lengths: Sequence[int],
    pack: Callable[[list[int], int], list[list[int]]],
    *,
    max_tokens: int,
    rank: int,
    world: int,
) -> list[list[int]]:
    """The micro-batches of this rank's share of the rows.

    `pack` groups lengths under the token budget, and is one of `common.model.batches`. Every rank gets the same number
    of micro-batches, because all ranks gather and reduce together; the last ones of a rank may be empty.
    """
    plans = []
    for share in shares(costs, world):
        groups = pack([lengths[row] for row in share], max_tokens)
        plans.append([[share[place] for place in group] for group in groups])
    return plans[rank] + [[] for _ in range(max(map(len, plans)) - len(plans[rank]))]


def sequence_costs(sequences: Sequences, size: ModelSize) -> list[int]:
    """About how many floating-point operations the forward pass of each sequence takes: those of its contexts. Only
    response tokens pass the output embedding."""
    tokens, answered = sequences.context_lengths.double(), sequences.context_response_lengths.double()
    costs = forward_operations(size, tokens, answered).long()
    rows = torch.arange(len(sequences.contexts)).repeat_interleave(sequences.contexts)
    return torch.zeros_like(sequences.lengths).index_add(0, rows, costs).tolist()
