"""The reward service: the input of a source, the sum of scores, judges, and failures."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from actors.scoring.function_source import FunctionSource
from actors.scoring.http_source import HttpSource
from actors.scoring.reward import Reward
from common.config.actors import RewardConfig, SourcesConfig
from common.config.sources import FunctionSourceConfig, HttpSourceConfig
from common.model.files import load_tokenizer
from common.types import RawScore, RewardInput, Score, Void
from tests.actors.scoring.test_http_source import close, service
from tests.fakes import END, OWN_TAGS, make_prompt, make_rollout, metered, save_tiny_model

MODULE = "tests.actors.scoring.test_reward"
SERVICE = SourcesConfig(sources=())
ANSWER = RewardInput("question", "yes", 2, "stop", {})
ROLLOUT = make_rollout(make_prompt(7, answer=3), [4, 5, END])
SAMPLE = ROLLOUT.prompt.sample_id
STRICT = "strict returned 'many' (str) where a number is needed"

seen: list[RewardInput] = []
events: list[str] = []
began, go_on = threading.Event(), threading.Event()


def remember(answer: RewardInput) -> float:
    seen.append(answer)
    return 2


def length(answer: RewardInput) -> float:
    return answer.response_tokens


def wrong_type(answer: RewardInput) -> float:
    return "many"  # type: ignore[return-value]


def huge(answer: RewardInput) -> float:
    return 3e38


def fills_float64(answer: RewardInput) -> float:
    return 1e308


def first_digit(answer: RewardInput) -> float:
    return float(next(word for word in answer.response.split() if word.isdigit()))


def blocks(answer: RewardInput) -> float:
    """Returns when the test lets it go on, or after 5 s, so that the test can fail."""
    events.append("function begins")
    began.set()
    go_on.wait(5)
    events.append("function ends")
    return 1.0


def reports(answer: RewardInput) -> float:
    events.append(f"{answer.prompt} begins")
    threading.Event().wait(0.002)  # another call could begin now
    events.append(f"{answer.prompt} ends")
    return 1.0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def imported():
    """This module as the service imports it. pytest runs another copy of it."""
    import tests.actors.scoring.test_reward as module

    module.seen.clear()
    module.events.clear()
    module.began.clear()
    module.go_on.clear()
    return module


def function(name: str, path: str, weight: float = 1.0) -> dict[str, Any]:
    return {"name": name, "function": path if ":" in path else f"{MODULE}:{path}", "weight": weight}


def make_reward(tokenizer, *sources: dict[str, Any], judges: tuple[dict[str, Any], ...] = ()) -> Reward:
    cfg = RewardConfig.model_validate({"sources": sources})
    return Reward("Reward(0)", cfg, model=tokenizer, judges=[FunctionSourceConfig(**judge) for judge in judges])


def score(tokenizer, *sources: dict[str, Any]) -> Score | Void:
    return asyncio.run(make_reward(tokenizer, *sources).score(ROLLOUT))


# Input and score


def test_a_function_gets_texts_token_ids_and_fields(tokenizer, imported):
    score(tokenizer, function("seen", "remember"))
    prompt = ROLLOUT.prompt.token_ids.tolist()
    raw = tokenizer.decode([4, 5, END])
    assert raw != "a0 a1"
    assert imported.seen == [RewardInput("prompt 7", "a0 a1", 3, "stop", {"answer": 3}, None, raw, prompt, [4, 5, END])]


def test_a_function_gets_the_prompts_messages(tokenizer, imported):
    messages = [{"role": "user", "content": "a7"}]
    rollout = replace(ROLLOUT, prompt=replace(ROLLOUT.prompt, messages=messages))
    asyncio.run(make_reward(tokenizer, function("seen", "remember")).score(rollout))
    assert [(answer.prompt, answer.messages) for answer in imported.seen] == [("prompt 7", messages)]


def test_the_total_is_the_weighted_sum_of_raw_scores(tokenizer):
    result = score(tokenizer, function("two", "remember", 0.5), function("tokens", "length", -2.0))
    assert result == Score(
        0.5 * 2 - 2.0 * 3,
        {"two": 2.0, "tokens": 3.0},
        {"two": f"{MODULE}:remember", "tokens": f"{MODULE}:length"},
    )


def test_a_function_and_a_service_score_the_same_rollout(tokenizer):
    async def scenario():
        async def handler(request):
            sent = await request.json()
            return web.json_response({"score": len(sent["response"]), "model": "counter v2"})

        async with service(handler) as url:
            counter = {"name": "letters", "urls": [url], "weight": 10.0}
            reward = make_reward(tokenizer, function("tokens", "length"), counter)
            found = await reward.score(ROLLOUT)
            await close(*(call for _, call in reward._sources if isinstance(call, HttpSource)))
        return found, url

    found, url = asyncio.run(scenario())
    # 3 tokens; "a0 a1" has 5 letters.
    assert found == Score(
        53.0, {"tokens": 3.0, "letters": 5.0}, {"tokens": f"{MODULE}:length", "letters": f"counter v2 at {url}"}
    )


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("tests.tasks:not_a_number", "reward source broken returned nan"),
        ("wrong_type", "reward source broken returned 'many' (str) where a number is needed"),
    ],
)
def test_a_failure_voids_the_rollout_with_its_reason(tokenizer, path, reason):
    result = score(tokenizer, function("two", "remember"), function("broken", path, 0.0))
    assert result == Void(ROLLOUT.prompt.sample_id, reason, response="a0 a1")


@pytest.mark.parametrize(
    ("sources", "reason"),
    [
        ([("big", "fills_float64", 1e-300)], "reward source big returned 1e+308, which float32 cannot hold"),
        (
            [("big", "huge", 2.0)],
            "the total of the weighted scores must fit float32: 2 * 3e+38 (big) = 6e+38",
        ),
        (
            [("up", "huge", 1e308), ("down", "huge", -1e308)],  # inf - inf
            "the total of the weighted scores must fit float32: 1e+308 * 3e+38 (up) + -1e+308 * 3e+38 (down) = nan",
        ),
    ],
)
def test_a_score_or_total_that_float32_cannot_hold_voids_the_rollout(tokenizer, sources, reason):
    result = score(tokenizer, *(function(name, path, weight) for name, path, weight in sources))
    assert result == Void(ROLLOUT.prompt.sample_id, reason, response="a0 a1")


def test_totals_up_to_the_largest_of_float32_count(tokenizer):
    assert score(tokenizer, function("big", "huge")).total == 3e38


def test_a_void_carries_prompt_response_and_traceback(tokenizer):
    result = score(tokenizer, function("digit", "first_digit"))
    assert isinstance(result, Void)
    assert (result.error.prompt, result.error.response) == ("prompt 7", tokenizer.decode([4, 5, END]))
    assert "in first_digit" in result.error.traceback
    assert result.error.fault.startswith("reward source digit raised StopIteration (test_reward.py, line ")


def test_a_source_that_is_too_slow_for_the_driver_voids_the_rollout(tokenizer, imported):
    cfg = RewardConfig.model_validate(
        {"sources": [function("slow", "blocks")], "timeout_s": 0.2, "call_timeout_s": 0.1}
    )
    reward = Reward("Reward(0)", cfg, model=tokenizer)

    async def scenario():
        return await asyncio.gather(*(reward.score(ROLLOUT) for _ in range(4)))

    results = asyncio.run(scenario())
    imported.go_on.set()
    waited = "reward source slow gave no score within 0.18 s (0.9 * timeout_s), waiting for its turn included"
    assert [result.reason for result in results] == [
        "reward source slow took longer than call_timeout_s (0.1 s)",
        *[waited] * 3,
    ]


def test_a_stop_iteration_in_a_function_is_an_ordinary_failure(tokenizer):
    """A future refuses a StopIteration: without care the caller would wait for ever."""

    async def scenario():
        return await asyncio.wait_for(make_reward(tokenizer, function("digit", "first_digit")).score(ROLLOUT), 5)

    result = asyncio.run(scenario())
    assert isinstance(result, Void)
    assert result.sample_id == ROLLOUT.prompt.sample_id
    assert result.reason.startswith("reward source digit raised ")
    assert "StopIteration" in result.reason


# Judges


def test_judges_do_not_change_the_total(tokenizer):
    reward = make_reward(tokenizer, function("two", "remember", 0.5), judges=(function("tokens", "length", 100.0),))
    two = {"two": 2.0}, {"two": f"{MODULE}:remember"}
    assert asyncio.run(reward.score(ROLLOUT)) == Score(1.0, *two)
    assert asyncio.run(reward.judge(ROLLOUT)) == Score(
        1.0, {**two[0], "tokens": 3.0}, {**two[1], "tokens": f"{MODULE}:length"}
    )


def test_training_never_asks_a_judge(tokenizer, imported):
    reward = make_reward(tokenizer, function("tokens", "length"), judges=(function("judge", "remember"),))
    asyncio.run(reward.score(ROLLOUT))
    assert imported.seen == []
    asyncio.run(reward.judge(ROLLOUT))
    assert len(imported.seen) == 1


def test_a_judge_that_fails_leaves_the_score_of_the_sources(tokenizer):
    reward = make_reward(tokenizer, function("tokens", "length"), judges=(function("strict", "wrong_type"),))
    assert isinstance(asyncio.run(reward.score(ROLLOUT)), Score)
    result, reason = asyncio.run(reward.judge(ROLLOUT)), f"judge {STRICT}"
    void = Void(SAMPLE, reason, response="a0 a1")
    assert result == Score(3.0, {"tokens": 3.0}, {"tokens": f"{MODULE}:length"}, judge_voids={"strict": void})
    assert result.judge_voids["strict"].error.fault == "judge strict returned <class 'str'>"


def test_a_source_that_fails_voids_the_answer_whatever_judges_say(tokenizer):
    reward = make_reward(tokenizer, function("strict", "wrong_type"), judges=(function("judge", "wrong_type"),))
    found = asyncio.run(reward.judge(ROLLOUT))
    assert found == Void(SAMPLE, f"reward source {STRICT}", response="a0 a1")


def test_without_judges_judging_is_scoring(tokenizer):
    reward = make_reward(tokenizer, function("tokens", "length"))
    assert asyncio.run(reward.judge(ROLLOUT)) == asyncio.run(reward.score(ROLLOUT))


# Several sources at once


def test_a_function_that_blocks_does_not_hold_up_a_service(imported):
    async def scenario():
        async def handler(request):
            return web.json_response({"score": 2})

        async with service(handler) as url:
            slow = FunctionSource(FunctionSourceConfig(name="slow", function=f"{MODULE}:blocks"), SERVICE)
            quick = HttpSource(HttpSourceConfig(name="quick", urls=(url,)))
            waiting = asyncio.create_task(slow(ANSWER))
            assert await asyncio.to_thread(imported.began.wait, 5)
            await quick(ANSWER)
            imported.events.append("service has scored")
            imported.go_on.set()
            await waiting
            await close(quick)

    asyncio.run(scenario())
    assert imported.events == ["function begins", "service has scored", "function ends"]


def test_calls_of_a_function_come_one_at_a_time_in_order(imported):
    async def ask(source: Callable) -> list[RawScore]:
        return await asyncio.gather(*(source(replace(ANSWER, prompt=str(i))) for i in range(6)))

    path = f"{MODULE}:reports"
    found = asyncio.run(ask(FunctionSource(FunctionSourceConfig(name="s", function=path), SERVICE)))
    assert found == [RawScore(1.0, path)] * 6
    assert imported.events == [f"{i} {what}" for i in range(6) for what in ("begins", "ends")]


def test_a_void_is_counted_under_the_source_that_failed(tokenizer):
    memory = metered()
    reward = make_reward(tokenizer, function("fine", "length"), function("broken", "wrong_type"))

    async def scenario():
        for _ in range(2):
            await reward.score(ROLLOUT)
        fine = make_reward(tokenizer, function("fine", "length"), judges=(function("judge", "length"),))
        judged = make_reward(tokenizer, function("fine", "length"), judges=(function("judge", "wrong_type"),))
        await asyncio.gather(fine.score(ROLLOUT), fine.judge(ROLLOUT), judged.judge(ROLLOUT))

    asyncio.run(scenario())
    assert memory.read("ratchet_scored_rollouts_total", **OWN_TAGS) == [3]
    names = ("fine", "broken", "judge")
    voids = {name: memory.read("ratchet_reward_voids_total", **OWN_TAGS, source=name) for name in names}
    assert voids == {"fine": [0], "broken": [2], "judge": [1]}
