"""Rows that go together: minibatches, shares of ranks and micro-batches, and the cost of a sequence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.model.batches import packed_batches
from common.model.packing import Sequences
from common.model.size import ModelSize
from learner.ranks.rows import micro_batches, minibatches, sequence_costs, shares


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 64])
def test_loads_of_ranks_differ_by_at_most_the_costliest_row(world, count):
    for seed in range(5):
        costs = np.random.default_rng(seed).integers(1, 200, count).tolist()
        found = shares(costs, world)
        assert len(found) == world
        assert sorted(row for share in found for row in share) == list(range(count))
        assert all(share == sorted(share) for share in found)
        loads = [sum(costs[row] for row in share) for share in found]
        assert max(loads) - min(loads) <= max(costs, default=0)


def test_shares_worked_by_hand():
    # Costliest first to the least loaded: 5 to rank 0; 3 and 3 to rank 1, which has 3 when it gets the second; 2 to
    # rank 0, since 5 < 6; 2 to rank 1, since 6 < 7. Of two equal costs the lower row goes first.
    assert shares([2, 3, 5, 3, 2], 2) == [[0, 2], [1, 3, 4]]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 64])
@pytest.mark.parametrize("budget", [1, 50, 10**6])
def test_all_ranks_have_as_many_micro_batches_and_empty_ones_come_last(world, count, budget):
    costs = np.random.default_rng(count).integers(1, 200, count).tolist()

    plans = [
        micro_batches(costs, costs, packed_batches, max_tokens=budget, rank=rank, world=world) for rank in range(world)
    ]
    assert len({len(plan) for plan in plans}) == 1
    for plan, share in zip(plans, shares(costs, world), strict=True):
        assert sorted(row for rows in plan for row in rows) == share
        filled = [bool(rows) for rows in plan]
        assert filled == sorted(filled, reverse=True)
        assert all(len(rows) == 1 or sum(costs[row] for row in rows) <= budget for rows in plan)
    assert not plans[0] or any(all(plan) for plan in plans)  # none has more empty ones than it needs


def test_micro_batches_hold_rows_of_the_batch_and_follow_lengths():
    # Shares by cost as worked above: [0, 2] and [1, 3, 4]. Lengths: rank 0 has 1 + 1 = 2, one micro-batch of budget 2;
    # rank 1 has 2, 2 and 1, none of which fit together.
    plans = [
        micro_batches([2, 3, 5, 3, 2], [1, 2, 1, 2, 1], packed_batches, max_tokens=2, rank=rank, world=2)
        for rank in range(2)
    ]
    assert plans == [[[0, 2], [], []], [[1], [3], [4]]]


def test_a_batch_that_voids_made_smaller_still_has_every_row_once():
    for count, sizes in ((5, [2, 2, 1]), (2, [1, 1])):  # never an empty minibatch
        found = [rows.tolist() for rows in minibatches(count, epochs=1, parts=3, seed=1, step=4)]
        assert [len(rows) for rows in found] == sizes
        assert sorted(row for rows in found for row in rows) == list(range(count))


def test_every_epoch_has_every_row_once_in_equal_minibatches():
    found = [rows.tolist() for rows in minibatches(6, epochs=2, parts=3, seed=1, step=4)]
    assert [len(rows) for rows in found] == [2] * 6
    epochs = [[row for rows in part for row in rows] for part in (found[:3], found[3:])]
    assert [sorted(rows) for rows in epochs] == [list(range(6))] * 2
    assert epochs[0] != epochs[1]
    assert found == [rows.tolist() for rows in minibatches(6, epochs=2, parts=3, seed=1, step=4)]
    for other in ({"seed": 2, "step": 4}, {"seed": 1, "step": 5}):
        assert found != [rows.tolist() for rows in minibatches(6, epochs=2, parts=3, **other)]


def test_costs_of_a_small_model_worked_by_hand():
    size = ModelSize(parameters=1000, layers=3, hidden=8, heads=2, kv_heads=1, head_dim=5, vocabulary=10, context=4096)
    prompts, responses = [np.ones(2), np.ones(6), np.ones(1)], [np.ones(5), np.ones(1), np.ones(0)]
    # A token passes 1000 - 80 weights, a response token the 80 of the head too, each for 2 operations. Scores of T
    # tokens with half of T others on average, and the sums of values: 2 * 2 * T * T / 2 for each of 3 * 2 * 5 numbers.
    assert sequence_costs(Sequences.pack(prompts, responses), size) == [
        2 * (7 * 920 + 5 * 80) + 2 * 30 * 7 * 7,
        2 * (7 * 920 + 1 * 80) + 2 * 30 * 7 * 7,
        2 * 1 * 920 + 2 * 30,
    ]


def test_the_attention_of_a_sequence_is_that_of_its_contexts():
    size = ModelSize(parameters=1000, layers=3, hidden=8, heads=2, kv_heads=1, head_dim=5, vocabulary=10, context=4096)
    masks = [np.array([True, False, False, True]), np.ones(1, bool)]
    sequences = Sequences.pack([np.ones(2), np.ones(6)], [np.ones(4), np.ones(1)], masks, [[1], []])
    assert sequence_costs(sequences, size) == [
        2 * (6 * 920 + 2 * 80) + 2 * 30 * (3 * 3 + 3 * 3),
        2 * (7 * 920 + 1 * 80) + 2 * 30 * 7 * 7,
    ]
    assert sequence_costs(sequences.rows(torch.tensor([1, 0])), size) == sequence_costs(sequences, size)[::-1]


def test_costs_of_large_models_and_long_sequences_do_not_overflow():
    size = ModelSize(
        parameters=70_000_000_000,
        layers=80,
        hidden=8192,
        heads=64,
        kv_heads=8,
        head_dim=128,
        vocabulary=128_256,
        context=131_072,
    )
    (cost,) = sequence_costs(Sequences.pack([np.ones(100_000)], [np.ones(31_072)]), size)
    assert cost == pytest.approx(2 * 70e9 * 131_072 + 2 * 80 * 64 * 128 * 131_072**2, rel=0.02)
