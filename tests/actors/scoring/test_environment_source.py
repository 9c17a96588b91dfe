"""The reward source that adds up an environment's rewards, and what other sources get of the turns."""

import asyncio
import json
from dataclasses import replace

import pytest

from actors.scoring.environment_source import EnvironmentSource
from actors.scoring.http_source import HttpSource
from actors.scoring.reward import Reward
from common.config.actors import SourcesConfig
from common.config.sources import EnvironmentSourceConfig, FunctionSourceConfig, HttpSourceConfig
from common.model.files import load_tokenizer
from common.types import RewardInput, Score, Turn, Void
from tests.fakes import END, make_prompt, make_rollout, save_tiny_model

SOURCE = EnvironmentSourceConfig(name="game", environment=True, weight=2)
TURNS = (
    Turn(
        end=2, next_start=4, reward=0.25, observation=json.dumps([{"role": "user", "content": "a2"}]), info='{"n": 1}'
    ),
    Turn(end=5, next_start=5, reward=-1.5),
)
# The model's tokens are a0, END and a3; the environment's are a1 and a2.
EPISODE = replace(make_rollout(make_prompt(), [4, END, 5, 6, 7]), turns=TURNS)
EPISODE = replace(
    EPISODE,
    rollout_logprobs=EPISODE.rollout_logprobs[EPISODE.response_mask],
    policy_versions=EPISODE.policy_versions[EPISODE.response_mask],
)
seen: list[RewardInput] = []


def remember(answer: RewardInput) -> float:
    seen.append(answer)
    return 10


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tiny_model(tmp_path_factory.mktemp("model")))


def scored(tokenizer, rollout):
    function = FunctionSourceConfig(name="seen", function="tests.actors.scoring.test_environment_source:remember")
    reward = Reward("Reward(0)", SourcesConfig(sources=(SOURCE, function)), model=tokenizer)
    return asyncio.run(reward.score(rollout))


def test_the_score_is_the_sum_of_the_turns_rewards(tokenizer):
    score = scored(tokenizer, EPISODE)
    assert isinstance(score, Score)
    assert score.components == {"game": -1.25, "seen": 10}
    assert score.total == 2 * -1.25 + 10
    assert score.origins["game"] == "environment"


def test_a_reward_function_gets_the_turns(tokenizer):
    seen.clear()
    scored(tokenizer, EPISODE)
    [answer] = seen
    assert list(answer.turns) == [
        {"text": "a0", "observation": [{"role": "user", "content": "a2"}], "reward": 0.25, "info": {"n": 1}},
        {"text": "a3", "observation": [], "reward": -1.5, "info": {}},
    ]
    assert answer.response == "a0 a1 a2 a3"
    assert answer.response_tokens == 3


def test_a_response_without_turns_has_none_and_gets_no_score(tokenizer):
    seen.clear()
    void = scored(tokenizer, make_rollout(make_prompt(), [4, END]))
    assert isinstance(void, Void)
    assert void.reason == "reward source game needs an environment, which has answered no turn of this response"
    assert seen[0].turns == ()


def test_large_rewards_that_cancel_out_are_added_exactly():
    turns = [{"reward": reward} for reward in (1e17, 1.0, -1e17)]
    answer = RewardInput("q", "r", 1, "terminated", {}, turns=turns)
    assert asyncio.run(EnvironmentSource()(answer)).score == 1.0


def test_a_service_gets_the_turns_only_if_there_are_some():
    source = HttpSource(HttpSourceConfig(name="s", urls=("http://h/",)))
    answer = RewardInput("q", "r", 1, "stop", {})
    assert "turns" not in source._json(answer)
    assert source._json(replace(answer, turns=[{"reward": 1.0}]))["turns"] == [{"reward": 1.0}]
