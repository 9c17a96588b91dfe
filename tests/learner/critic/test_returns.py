"""Realised returns against their definition, token by token in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from common.config.actors import RewardConfig
from common.config.ppo import KLConfig
from common.experience_table import experience_table
from learner.critic.returns import realised_returns
from learner.ppo.experience import ExperienceBatch
from learner.ppo.scores import RunningMoments
from tests.contexts import ends_of
from tests.fakes import as_episode, random_turns
from tests.learner.critic.journals import rollout, step_table

SOURCES = [{"name": "a_words", "function": "tests.tasks:a_words"}]


def slow_kl(estimator: str, logprob: float, ref: float) -> float:
    x = ref - logprob
    found = {"k1": -x, "k2": x * x / 2, "k3": math.exp(x) - 1 - x}[estimator]
    return min(found, 10) if estimator == "k3" and x > 0 else found


@pytest.mark.parametrize(
    ("estimator", "gamma", "normalise", "clip"),
    [("k1", 1.0, "mean_std", 0.8), ("k2", 0.9, "std", 0.0), ("k3", 0.5, "none", 1.0)],
)
def test_returns_are_what_followed_each_token(estimator, gamma, normalise, clip):
    moments = RunningMoments(count=4, mean=1.0, squares=1.0)  # deviation sqrt(1 / 4) = 0.5
    reward = RewardConfig.model_validate({"sources": SOURCES, "normalise": normalise, "clip": clip})
    kl = KLConfig(coef=0.3, estimator=estimator)
    for step in (0, 1):  # the first has no reference log-probabilities
        table = step_table(step)
        batch = ExperienceBatch.from_table(table)
        scores, returns = realised_returns(batch, moments, reward=reward, kl=kl, gamma=gamma)
        for row, score, found in zip(table.to_pylist(), scores, returns):
            expected = {"none": row["score"], "std": row["score"] / 0.5}.get(normalise, (row["score"] - 1.0) / 0.5)
            if clip and normalise != "none":
                expected = max(-clip, min(clip, expected))
            assert score.item() == pytest.approx(expected, abs=1e-6)
            refs = row["ref_logprobs"] or row["rollout_logprobs"]
            rewards = [-0.3 * slow_kl(estimator, *pair) for pair in zip(row["rollout_logprobs"], refs)]
            rewards[-1] += expected
            for t in range(len(rewards)):
                later = sum(gamma**k * reward for k, reward in enumerate(rewards[t:]))
                assert found[t].item() == pytest.approx(later, abs=1e-5)
            assert not found[len(rewards) :].any()
    assert torch.isfinite(returns).all()
    assert np.ptp(returns.numpy()) > 0.1


@pytest.mark.parametrize("contexts", [False, True])
@pytest.mark.parametrize(("normalise", "unit"), [("mean_std", 0.5), ("std", 0.5), ("none", 1.0)])
def test_rewards_of_turns_are_followed_from_where_they_were_earned(normalise, unit, contexts):
    """In episodes from which the environment's tokens are taken out first, one turn after another."""
    moments = RunningMoments(count=4, mean=1.0, squares=1.0)
    game = {"name": "game", "environment": True, "weight": 3}
    reward = RewardConfig.model_validate({"sources": [*SOURCES, game], "normalise": normalise, "clip": 0.0})
    rng = np.random.default_rng(0)
    rows = [as_episode(rollout(i, 5), *random_turns(rng, int(rng.integers(4)), contexts=contexts)) for i in range(400)]
    rows = [row for row in rows if all(t.next_start <= len(row.rollout.response_ids) for t in row.rollout.turns)]
    table = experience_table(rows)
    batch = ExperienceBatch.from_table(table)
    scores, returns = realised_returns(batch, moments, reward=reward, kl=KLConfig(coef=0.3, estimator="k2"), gamma=0.9)
    several = sequences = 0
    for row, score, found in zip(table.to_pylist(), scores, returns):
        parts = [[]]  # the rewards of each turn's tokens
        logprobs = list(zip(row["rollout_logprobs"], row["ref_logprobs"]))
        earned = []
        place = 0
        for turn in row["turns"] or ():
            count = turn["end"] - place
            parts[-1] += [-0.3 * slow_kl("k2", *pair) for pair in logprobs[:count]]
            del logprobs[:count]
            earned.append((sum(map(len, parts)), 3 * turn["reward"] / unit))
            parts.append([])
            place = turn["next_start"]
        parts[-1] += [-0.3 * slow_kl("k2", *pair) for pair in logprobs]
        rewards = [reward for part in parts for reward in part]
        ends = sorted(ends_of(row))
        for end in ends:
            rewards[end] += score.item() - sum(amount for before, amount in earned if 0 < before <= end)
        for before, amount in earned:
            if before > 0 and before - 1 not in ends:
                rewards[before - 1] += amount
        for t in range(len(rewards)):
            own = rewards[t : 1 + min(end for end in ends if end >= t)]
            assert found[t].item() == pytest.approx(sum(0.9**k * r for k, r in enumerate(own)), abs=2e-5)
        sequences += len(ends) > 1
        assert not found[len(rewards) :].any()
        several += len({before for before, _ in earned if 0 < before < len(rewards)}) > 1
    assert several > 3
    assert (sequences > 3) == contexts
