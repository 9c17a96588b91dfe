"""The reward service: what a function is given, how scores add up, and what a failure becomes."""

from __future__ import annotations

import asyncio

import pytest

from actors.reward_functions import Reward
from common.config import RewardConfig
from common.models import load_tokenizer
from common.types import RewardInput, Score, Void
from tests.fakes import END, make_prompt, make_rollout, save_tiny_model

seen: list[RewardInput] = []


def remember(answer: RewardInput) -> float:
    seen.append(answer)
    return 2


def length(answer: RewardInput) -> float:
    return answer.response_tokens


def wrong_type(answer: RewardInput) -> float:
    return "many"  # type: ignore[return-value]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tiny_model(tmp_path_factory.mktemp("model")))


def score(tokenizer, *sources: tuple[str, str, float]) -> Score | Void:
    module = "tests.actors.test_reward_functions"
    cfg = RewardConfig.model_validate(
        {
            "sources": [
                {"name": name, "function": function if ":" in function else f"{module}:{function}", "weight": weight}
                for name, function, weight in sources
            ]
        }
    )
    rollout = make_rollout(make_prompt(7, answer=3), [4, 5, END])
    return asyncio.run(Reward("Reward(0)", cfg, model=tokenizer).score(rollout))


def test_a_function_gets_text_without_special_tokens_and_the_prompts_fields(tokenizer):
    import tests.actors.test_reward_functions as module  # the copy that the service imported

    score(tokenizer, ("seen", "remember", 1.0))
    assert module.seen[-1] == RewardInput("prompt 7", "a0 a1", 3, "stop", {"answer": 3})


def test_the_total_is_the_weighted_sum_and_every_raw_score_is_kept(tokenizer):
    result = score(tokenizer, ("two", "remember", 0.5), ("tokens", "length", -2.0))
    assert result == Score(0.5 * 2 - 2.0 * 3, {"two": 2.0, "tokens": 3.0})


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("tests.tasks:not_a_number", "reward source broken returned nan"),
        ("wrong_type", "reward source broken raised ValueError: could not convert string to float: 'many'"),
    ],
)
def test_a_failure_voids_the_rollout_with_its_reason(tokenizer, function, reason):
    result = score(tokenizer, ("two", "remember", 1.0), ("broken", function, 0.0))
    assert result == Void(make_prompt(7).sample_id, reason)
