"""Kept states of a trunk: the head trains on them under the token budget. For two ranks see test_ranks.py."""

from __future__ import annotations

import pytest
import torch

from learner.critic.rollouts import Rollouts, choose_steps
from learner.ppo.frozen_states import FrozenStates, FrozenStatesOnDisk, States
from tests.fakes import save_tiny_model
from tests.learner.critic.journals import step_table, write_journal
from tests.learner.critic.test_trainer import batches, config, make_trainer, remember
from tests.learner.ppo.test_learner import varied_batch
from tests.learner.ppo.test_value_passes import learner_with

BUDGET = 9


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_rows_come_back_in_the_order_asked_for(tmp_path, place):
    kept = FrozenStates() if place == "memory" else FrozenStatesOnDisk(tmp_path)
    states = torch.arange(12.0).view(6, 2).bfloat16()
    kept.add([7, 3, 5], [2, 0, 1], states[:3])
    kept.add([1], [3], states[3:])
    assert torch.equal(kept.of([1, 3, 7]), states[[3, 4, 5, 0, 1]])
    assert kept.of([]).shape == (0, 2)
    assert kept.of([3]).dtype == torch.bfloat16
    assert [row in kept for row in (1, 2, 3)] == [True, False, True]


def tokens_of_passes(trainer) -> list[int]:
    """The tokens of each pass of the head alone, as they come."""
    found, forward = [], trainer.forward

    def counting(batch, *arguments, **options):
        if isinstance(batch, States):
            found.append(len(batch.values))
        return forward(batch, *arguments, **options)

    trainer.forward = counting
    return found


def test_a_head_takes_no_more_tokens_at_once_than_the_budget(model, tmp_path):
    write_journal(tmp_path, [step_table(step) for step in range(6)])
    rollouts = Rollouts([choose_steps(tmp_path, slice(None))])
    critic = make_trainer(config(model, "shared", micro_batch_tokens=BUDGET), rollouts, tmp_path)
    remember(critic, rollouts)
    table = batches(rollouts)[0]
    longest, tokens = max(map(len, table["response_ids"])), sum(map(len, table["response_ids"]))
    found = tokens_of_passes(critic)
    critic.update(table)
    critic.values(table)
    assert sum(found) == 2 * tokens > 4 * BUDGET
    assert max(found) <= max(longest, BUDGET)

    learner, table = learner_with(model, "shared", 1, tokens=BUDGET, minibatches=1), varied_batch(0)
    found = tokens_of_passes(learner)
    learner.update(table)
    longest, tokens = max(map(len, table["response_ids"])), sum(map(len, table["response_ids"]))
    assert sum(found) == tokens > 2 * BUDGET
    assert max(found) <= max(longest, BUDGET)
