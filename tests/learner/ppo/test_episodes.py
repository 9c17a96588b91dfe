"""Updates on episodes: tokens of an environment are read and nothing else, and rewards of turns stay where they were
earned. An episode may be several contexts, and several sequences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from common.config.ppo import PPOConfig
from common.experience_table import experience_table
from common.types import Experience, Turn
from learner.ppo.experience import ExperienceBatch
from learner.ppo.learner import Learner
from learner.ppo.targets import advantages_and_returns
from tests.contexts import contexts_of, ends_of
from tests.fakes import as_episode, make_experience, random_turns, save_tiny_model, tiny_config
from tests.learner.ppo.test_learner import (
    MASK,
    OTHERWISE,
    UNUSUAL,
    SlowLearner,
    check_credit,
    grouped,
    parameters,
)

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


def episodes(seed: int, *, contexts: bool = False) -> pa.Table:
    return experience_table(episode_rows(seed, contexts=contexts))


def episode_rows(seed: int, *, contexts: bool = False) -> list[Experience]:
    """Eight responses of three or fewer turns, after which new contexts may begin. Every sampled token has
    log-probabilities of its own."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(8):
        turns = [] if index == 0 else random_turns(rng, int(rng.integers(1, 4)), contexts=contexts)
        if index == 1:  # the environment speaks first, the policy writes nothing in a turn, the environment has the end
            turns = [Turn(0, 2, 1.0), Turn(3, 5, -1.0), Turn(5, 7, 2.0), Turn(8, 10, 0.5)]
        elif index == 2:  # nothing is sampled at all
            turns = [Turn(0, 3, 1.0)]
        if contexts and index in (1, 2):
            turns = [replace(turn, new_context=True, ends=place % 3 != 1) for place, turn in enumerate(turns)]
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
    "lambdas by length": {"ppo": {"lam": "length", "value_lam": "length", "lam_alpha": 0.4}},
}


@pytest.mark.parametrize("contexts", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_updates_on_episodes_agree_with_a_slow_derivation(model, variant, contexts):
    learner = make_learner(model, VARIANTS[variant])
    slow = SlowLearner(model, learner.cfg)
    for seed, scale in enumerate([1 / 2, 1]):
        minibatches = [rows.tolist() for rows in learner._minibatches(8)]
        table = episodes(seed, contexts=contexts)
        expected = slow.update(table.to_pylist(), minibatches, scale)
        assert numbers(learner, table) == pytest.approx(expected, rel=2e-5, abs=2e-6)
        check_credit(learner, slow)
        weights = torch.cat([p.detach().flatten() for p in slow.parameters])
        found = parameters(learner)
        assert torch.allclose(found, weights[: len(found)], atol=1e-6)


@pytest.mark.parametrize("contexts", [False, True])
def test_a_response_is_compared_with_the_whole_rewards_of_its_group(model, contexts):
    learner = make_learner(model, {"ppo": {"advantages": "group"}, "prompts": {"rollouts_per_prompt": 2}})
    slow = SlowLearner(model, learner.cfg)
    table = grouped(episodes(0, contexts=contexts))
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


def test_the_contexts_of_these_tests_are_ragged():
    rows = [row for seed in range(2) for row in episodes(seed, contexts=True).to_pylist()]
    contexts = [contexts_of(row) for row in rows]
    assert len({len(found) for found in contexts}) >= 4
    assert any(not sampled for found in contexts for _, sampled in found)
    ends = [len(ends_of(row)) for row in rows]
    assert len(set(ends)) >= 3
    assert any(0 < count < len(found) for count, found in zip(ends, contexts, strict=True))  # GAE steps across some


@pytest.mark.parametrize("contexts", [False, True])
def test_micro_batches_do_not_change_the_update_on_episodes(model, contexts):
    results = []
    for tokens in (1, 40, 512):
        learner = make_learner(
            model, {"learner": {"micro_batch_tokens": tokens}, "optimizer": {"max_grad_norm": 1e9, "eps": 1e-3}}
        )
        results.append((numbers(learner, episodes(0, contexts=contexts)), parameters(learner)))
    for stats, found in results[1:]:
        assert stats == pytest.approx(results[0][0], rel=1e-5, abs=5e-6)
        assert torch.allclose(found, results[0][1], atol=1e-6)


@pytest.mark.parametrize("contexts", [False, True])
@pytest.mark.parametrize("micro_batch_tokens", [1, 512])
def test_the_policy_measures_its_own_tokens_alone(model, micro_batch_tokens, contexts):
    learner = make_learner(model, {"learner": {"micro_batch_tokens": micro_batch_tokens}})
    slow = SlowLearner(model, learner.cfg)
    rows = episode_rows(0, contexts=contexts)
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


def test_contexts_change_no_bit_of_other_rows(model):
    """Of what is computed for each row alone: a pass over all rows is the same work in both cases."""
    learner, rows = make_learner(model, {"ppo": {"whiten_advantages": False}}), episode_rows(0)
    plain = [row for row in rows if not row.rollout.turns or row.rollout.turns[0].end > 0]
    assert 2 <= len(plain) < len(rows)
    learner.update(experience_table(rows))
    before = learner.credit()
    other = make_learner(model, {"ppo": {"whiten_advantages": False}})
    cut = [row if any(row is kept for kept in plain) else with_contexts(row) for row in rows]
    assert sum(bool(row.rollout.context_starts) for row in cut) >= 2
    other.update(experience_table(cut))
    after = other.credit()
    for index, row in enumerate(rows):
        if any(row is kept for kept in plain):
            for name in ("kl", "rewards", "td_errors", "advantages", "returns", "values", "ends"):
                assert before[name][index].equals(after[name][index]), name


def with_contexts(row: Experience) -> Experience:
    """The same tokens, of which all that an environment said are new prompts."""
    turns = [
        replace(turn, new_context=turn.next_start > turn.end, ends=turn.next_start > turn.end)
        for turn in row.rollout.turns
    ]
    return replace(row, rollout=replace(row.rollout, turns=tuple(turns)))


def test_sequences_of_a_row_have_the_lambdas_of_rows_of_their_own():
    """One row of two contexts that one sequence spans, and of another sequence; and each sequence as a row."""
    turns = [Turn(2, 4, 0.0, new_context=True), Turn(7, 9, 0.0, new_context=True, ends=True)]
    together = [as_episode(make_experience(0, list(range(2, 2 + 10))), *turns)]  # 2 + 3 tokens, and 1
    apart = [make_experience(0, [2, 3, 4, 5, 6]), make_experience(1, [2])]
    one, several = (ExperienceBatch.from_table(experience_table(rows)) for rows in (together, apart))
    rewards, values = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0))
    spread = [torch.zeros(2, 5) for _ in range(2)]
    for whole, rows in zip((rewards, values), spread, strict=True):
        rows[0], rows[1, 0] = whole[0, :5], whole[0, 5]
    ppo = PPOConfig(lam="length", lam_alpha=0.5, value_lam=1.0, gamma=0.9)
    found = advantages_and_returns(rewards, values, one, ppo)
    for mine, theirs in zip(found, advantages_and_returns(*spread, several, ppo), strict=True):
        assert mine[0].tolist() == [*theirs[0].tolist(), theirs[1, 0].item()]
    # 5 tokens: 1 - 1 / (0.5 x 5) = 0.6; 1 token: 0.
    other = ppo.model_copy(update={"lam": 0.6})
    assert torch.equal(found[0], advantages_and_returns(rewards, values, one, other)[0])


def test_a_new_context_sees_nothing_before_it(model):
    """Two episodes whose tokens before the new prompt differ have the same log-probabilities after it."""
    learner = make_learner(model)
    found = []
    for first, new_context in ((5, True), (40, True), (5, False), (40, False)):
        response = [first, first + 1, 30, 31, 7, 8]
        row = as_episode(make_experience(0, response), Turn(2, 4, 0.0, new_context=new_context))
        found.append(learner.policy_logprobs(row.rollout)[0])
    assert np.array_equal(found[0][2:], found[1][2:])
    assert np.abs(found[2][2:] - found[3][2:]).min() > 1e-5
    assert np.abs(found[0][:2] - found[1][:2]).min() > 1e-5
    alone = make_experience(0, [7, 8])
    prompt = replace(alone.rollout.prompt, token_ids=np.array([30, 31], np.int32))
    [expected] = learner.policy_logprobs(replace(alone.rollout, prompt=prompt))
    np.testing.assert_allclose(found[0][2:], expected, atol=1e-6)


def test_returns_without_penalties_are_those_of_one_sequence(model):
    """Every sequence ends with the score, less what turns earned before."""
    tree = {
        "kl": {"coef": 0.0, "controller": "fixed"},
        "ppo": {"advantages": "returns", "gamma": 1.0, "value_lam": None},
    }
    credits = []
    for rows in (episode_rows(1), [with_contexts(row) for row in episode_rows(1)]):
        learner = make_learner(model, tree)
        learner.update(experience_table(rows))
        credits.append(learner.credit())
    one, several = ([x for row in credit["returns"].to_pylist() for x in row] for credit in credits)
    assert several == pytest.approx(one, abs=1e-5)
    assert credits[0]["rewards"] != credits[1]["rewards"]
    assert sum(map(sum, credits[1]["ends"].to_pylist())) > sum(map(bool, credits[1]["ends"].to_pylist()))
