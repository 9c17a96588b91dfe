"""The section [environment]: its kinds, limits and properties, and the source that needs it."""

import pytest
from pydantic import ValidationError

from common.config.environment import EnvironmentConfig
from common.config.ppo import Config
from common.config.reward_model import PairSamplingConfig

SOURCE = {"name": "game", "environment": True, "weight": 2}


def config(**sections):
    return Config.model_validate({"prompts": {"train": "t"}, "reward": {"sources": [SOURCE]}, **sections})


def refusal(**settings):
    with pytest.raises(ValidationError) as caught:
        EnvironmentConfig(**settings)
    (fault,) = caught.value.errors()
    return fault["msg"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({}, "none of them"),
        ({"function": "m:C", "agent": "m:f"}, "function and agent"),
        ({"function": "m:C", "tools": ["m:add"]}, "function and tools"),
        ({"tools": []}, "none of"),
    ],
)
def test_exactly_one_kind_of_environment_is_named(given, named):
    assert f"exactly one of function, tools, agent and verifiers must be set, not {named}" in refusal(**given)
    assert EnvironmentConfig(function="m:C").name == "m:C"
    assert EnvironmentConfig(agent="m:play").name == "m:play"
    assert EnvironmentConfig(verifiers="gsm8k").name == "gsm8k"
    assert EnvironmentConfig(tools=("m:add", "m:sub")).name == "m:add, m:sub"


def test_a_step_must_end_before_the_call_that_waits_for_it():
    assert "step_timeout_s (9) must be below 0.9 * timeout_s (9)" in refusal(
        function="m:C", step_timeout_s=9, timeout_s=10
    )
    assert EnvironmentConfig(function="m:C", step_timeout_s=8.9, timeout_s=10).step_timeout_s == 8.9


def test_concurrent_is_the_number_of_requests_sent_to_each_process():
    assert EnvironmentConfig(function="m:C", concurrent=7).in_flight == 7
    with pytest.raises(ValidationError, match="in_flight"):
        EnvironmentConfig(function="m:C", in_flight=7)


def test_the_longest_response_is_one_turn_or_an_episode():
    alone = Config.model_validate(
        {"prompts": {"train": "t"}, "reward": {"sources": [{"name": "s", "function": "m:f"}]}}
    )
    assert (alone.max_response_tokens, alone.max_response_setting) == (256, "sampling.max_new_tokens")
    episodes = config(environment={"function": "m:C", "max_tokens": 900}, prompts={"train": "t", "max_tokens": 100})
    assert (episodes.max_response_tokens, episodes.max_response_setting) == (900, "environment.max_tokens")
    assert episodes.max_sequence_tokens == 1000


def test_the_source_of_an_environment_weighs_the_rewards_of_turns():
    assert config(environment={"function": "m:C"}).reward.turn_weight == 2
    with pytest.raises(ValidationError, match=r"reward\.sources\.0\.environment\.environment"):
        config(environment={"function": "m:C"}, reward={"sources": [{**SOURCE, "environment": False}]})


def test_pairs_have_no_environment():
    tree = {"prompts": {"source": "t"}, "labeller": {"sources": [SOURCE]}}
    with pytest.raises(ValidationError, match=r"reward source game: environment \(true\) needs .* pairs have one turn"):
        PairSamplingConfig.model_validate(tree)
