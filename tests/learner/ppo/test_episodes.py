"""Updates on episodes: tokens of an environment are read and nothing else, and rewards of turns stay where they were
earned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from common.experience_table import experience_table
from common.types import Experience, Turn
from learner.ppo.learner import Learner
from tests.fakes import as_episode, make_experience, random_turns, save_tiny_model, tiny_config
from tests.learner.ppo.test_learner import MASK, OTHERWISE, UNUSUAL, SlowLearner, check_credit, grouped, parameters

WEIGHT = 0.7
EPISODES: dict[str, Any] = {
    "environment": {"function": "tests.tasks:NoSuchClass", "max_tokens": 40},
    "reward": {
        "sources": [
            {"name": "a_words", "function": "tests.tasks:a_words"},
            {"name": "game", "environment": True, "weight": WEIGHT},
        ]
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def episodes(seed: int) -> pa.Table:
    return experience_table(episode_rows(seed))


def episode_rows(seed: int) -> list[Experience]:
    """Eight responses of three or fewer turns. Every sampled token has log-probabilities of its own."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(8):
        turns = [] if index == 0 else random_turns(rng, int(rng.integers(1, 4)))
        if index == 1:  # the environment speaks first, the policy writes nothing in a turn, the environment has the end
            turns = [Turn(0, 2, 1.0), Turn(3, 5, -1.0), Turn(5, 7, 2.0), Turn(8, 10, 0.5)]
        elif index == 2:  # nothing is sampled at all
            turns = [Turn(0, 3, 1.0)]
        ends = turns[-1].next_start if turns else 3
        length = ends + (int(rng.integers(4)) if index > 2 else 0)
        score = rng.normal(1, 2) + WEIGHT * sum(turn.reward for turn in turns)
        plain = make_experience(index, rng.integers(2, 60, length).tolist(), score=score)
        sampled, ref = (rng.uniform(low, low + 1.0, length).astype(np.float32) for low in (-4.7, -4.2))
        plain = replace(plain, rollout=replace(plain.rollout, rollout_logprobs=sampled), ref_logprobs=ref)
        rows.append(as_episode(plain, *turns))
    return rows


def settings(*trees: dict[str, Any]) -> dict[str, Any]:
    """Sections of later trees change those of earlier ones."""
    result: dict[str, Any] = {}
    for tree in (UNUSUAL, EPISODES, *trees):
        for key, value in tree.items():
            result[key] = {**result.get(key, {}), **value} if isinstance(value, dict) else value
    return result


def make_learner(model, *trees: dict[str, Any]) -> Learner:
    return Learner(tiny_config(model, rollouts_per_step=8, **settings(*trees)))


def numbers(learner: Learner, table: pa.Table) -> dict[str, float]:
    return {key: value for key, value in learner.update(table).items() if not key.startswith("time/")}


VARIANTS: dict[str, dict[str, Any]] = {
    "unusual": {},
    "otherwise": OTHERWISE,
    "mask": MASK,
    "separate-unnormalised": {"learner": {"critic": "separate"}, "reward": {"normalise": "none"}},
    "returns": {"ppo": {"advantages": "returns"}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_updates_on_episodes_agree_with_a_slow_derivation(model, variant):
    learner = make_learner(model, VARIANTS[variant])
    slow = SlowLearner(model, learner.cfg)
    for seed, scale in enumerate([1 / 2, 1]):
        minibatches = [rows.tolist() for rows in learner._minibatches(8)]
        table = episodes(seed)
        expected = slow.update(table.to_pylist(), minibatches, scale)
        assert numbers(learner, table) == pytest.approx(expected, rel=2e-5, abs=2e-6)
        check_credit(learner, slow)
        weights = torch.cat([p.detach().flatten() for p in slow.parameters])
        found = parameters(learner)
        assert torch.allclose(found, weights[: len(found)], atol=1e-6)


def test_a_response_is_compared_with_the_whole_rewards_of_its_group(model):
    learner = make_learner(model, {"ppo": {"advantages": "group"}, "prompts": {"rollouts_per_prompt": 2}})
    slow = SlowLearner(model, learner.cfg)
    table = grouped(episodes(0))
    expected = slow.update(table.to_pylist(), [rows.tolist() for rows in learner._minibatches(8)], 1 / 2)
    assert numbers(learner, table) == pytest.approx(expected, rel=2e-5, abs=2e-6)
    check_credit(learner, slow)


def test_the_episodes_of_these_tests_are_ragged():
    tables = [episodes(seed) for seed in range(2)]
    turns = [turn for table in tables for row in table["turns"].to_pylist() for turn in row or ()]
    assert 0 in [turn["next_start"] - turn["end"] for turn in turns]
    assert 0 in [turn["end"] for turn in turns]
    lengths = [len(row) for table in tables for row in table["rollout_logprobs"].to_pylist()]
    assert len(set(lengths)) > 4
    holes = sum(turn["next_start"] - turn["end"] for turn in turns)
    assert sum(lengths) + holes == sum(len(row) for table in tables for row in table["response_ids"].to_pylist())


def test_micro_batches_do_not_change_the_update_on_episodes(model):
    results = []
    for tokens in (1, 40, 512):
        learner = make_learner(
            model, {"learner": {"micro_batch_tokens": tokens}, "optimizer": {"max_grad_norm": 1e9, "eps": 1e-3}}
        )
        results.append((numbers(learner, episodes(0)), parameters(learner)))
    for stats, found in results[1:]:
        assert stats == pytest.approx(results[0][0], rel=1e-5, abs=5e-6)
        assert torch.allclose(found, results[0][1], atol=1e-6)


@pytest.mark.parametrize("micro_batch_tokens", [1, 512])
def test_the_policy_measures_its_own_tokens_alone(model, micro_batch_tokens):
    learner = make_learner(model, {"learner": {"micro_batch_tokens": micro_batch_tokens}})
    slow = SlowLearner(model, learner.cfg)
    rows = episode_rows(0)
    found = learner.policy_logprobs(*(row.rollout for row in rows))
    for row, logprobs in zip(experience_table(rows).to_pylist(), found, strict=True):
        with torch.no_grad():
            expected = [token["logprob"].item() for token in slow.tokens(row)]
        np.testing.assert_allclose(logprobs, expected, atol=1e-5)


def test_an_episode_of_one_turn_gives_the_bits_of_a_response(model):
    """Its reward is part of its score, and both are on its last token."""
    results = []
    for is_episode in (False, True):
        learner = make_learner(model)
        rows = [
            make_experience(i, [4 + i, *range(10, 10 + i), 1], score=score)
            for i, score in enumerate([0.3, 1 / 3, -0.7, 2.9, 1e-3, 0.1, 7 / 9, -2.2])
        ]
        if is_episode:
            rows = [as_episode(row, Turn(i + 2, i + 2, row.score.total / 3)) for i, row in enumerate(rows)]
        results.append((numbers(learner, experience_table(rows)), learner.credit(), parameters(learner)))
    (plain, plain_credit, plain_weights), (stats, credit, weights) = results
    assert stats == plain
    assert credit.equals(plain_credit)
    assert torch.equal(weights, plain_weights)


def test_what_an_environment_says_changes_the_tokens_after_it_alone(model):
    """The policy reads it."""
    learner, other = make_learner(model), make_learner(model)
    response = [5, 6, 30, 31, 7, 8]
    turns = Turn(2, 4, 0.0), Turn(6, 6, 1.0)

    def table(said: int) -> pa.Table:
        rows = [as_episode(make_experience(i, [*response[:3], said, *response[4:]]), *turns) for i in range(8)]
        return experience_table(rows)

    for one, said in ((learner, 31), (other, 50)):
        one.update(table(said))
    first, second = (one.credit()["old_logprobs"].to_pylist() for one in (learner, other))
    for row, changed in zip(first, second, strict=True):
        assert row[:2] == pytest.approx(changed[:2], abs=1e-6)
        assert np.abs(np.subtract(row[2:], changed[2:])).min() > 1e-5
