"""Questions asked at once: every answer is kept exactly once, in batches, also when one of them fails."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from common.types import SampleId
from learner.evaluation import asking
from learner.evaluation.asking import ask_all, questions
from tests.fakes import make_prompt


@pytest.fixture
def prompts():
    return [replace(make_prompt(i), sample_id=SampleId(-1, i, 0)) for i in range(5)]


class Policy:
    """Answers a prompt with its sample id, out of order, and counts how many it works on."""

    def __init__(self, fails=None):
        self.fails, self.working, self.most = fails, 0, 0

    async def answer(self, prompt):
        self.working += 1
        self.most = max(self.most, self.working)
        for _ in range((7 * prompt.sample_id.prompt + 3 * prompt.sample_id.replica) % 5):
            await asyncio.sleep(0)
        self.working -= 1
        if prompt.sample_id == self.fails:
            raise RuntimeError("the pool has failed")
        return prompt.sample_id


def ask(policy, asked, **options):
    kept = []
    try:
        asyncio.run(ask_all(asked, policy.answer, kept.append, **options))
    except RuntimeError as error:
        return kept, error
    return kept, None


def test_every_sample_of_every_prompt_is_asked_under_its_own_id(prompts):
    ids = [question.sample_id for question in questions(prompts, 3, set())]
    assert ids == [SampleId(-1, prompt, sample) for sample in range(3) for prompt in range(5)]
    assert [question.text for question in questions(prompts, 3, set())] == 3 * [prompt.text for prompt in prompts]


def test_known_answers_are_not_asked_again(prompts):
    known = {SampleId(-1, 0, 0), SampleId(-1, 4, 2)}
    assert {question.sample_id for question in questions(prompts, 3, known)} == {
        SampleId(-1, prompt, sample) for prompt in range(5) for sample in range(3)
    } - known
    assert questions(prompts, 1, {SampleId(-1, prompt, 0) for prompt in range(5)}) == []


@pytest.mark.parametrize("batch", [1, 4, 64])
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_every_answer_is_kept_once_in_whole_batches(prompts, at_once, batch):
    policy, asked = Policy(), questions(prompts, 6, set())
    kept, _ = ask(policy, asked, at_once=at_once, batch=batch)
    assert sorted(answer for part in kept for answer in part) == sorted(question.sample_id for question in asked)
    assert all(len(part) == batch for part in kept[:-1])
    assert policy.most == at_once or policy.most < at_once == 100


def test_the_answers_before_an_error_are_kept(prompts):
    asked = questions(prompts, 6, set())
    kept, error = ask(Policy(fails=asked[20].sample_id), asked, at_once=1, batch=8)
    assert str(error) == "the pool has failed"
    assert [answer for part in kept for answer in part] == [question.sample_id for question in asked[:20]]


def test_an_answer_is_kept_in_time_though_no_other_comes(prompts, monkeypatch):
    monkeypatch.setattr(asking, "EVERY_S", 0.001)
    kept = asyncio.Event()

    async def answer(prompt):
        if prompt.sample_id.prompt:  # waits for the first answer to be kept
            await asyncio.wait_for(kept.wait(), 10)
        return prompt.sample_id

    parts = []
    asyncio.run(ask_all(prompts, answer, lambda part: (parts.append(part), kept.set()), at_once=5))
    assert parts[0] == [prompts[0].sample_id]
    assert sorted(answer for part in parts for answer in part) == [prompt.sample_id for prompt in prompts]


def test_an_error_of_keeping_in_time_ends_the_asking(prompts, monkeypatch):
    monkeypatch.setattr(asking, "EVERY_S", 0.001)

    async def answer(prompt):
        if prompt.sample_id.prompt:
            await asyncio.wait_for(asyncio.Event().wait(), 10)
        return prompt.sample_id

    def refuse(answers):
        raise RuntimeError("too many have no score")

    with pytest.raises(RuntimeError, match="too many have no score"):
        asyncio.run(ask_all(prompts, answer, refuse, at_once=5))


def test_an_error_of_keeping_ends_the_asking(prompts):
    def refuse(answers):
        raise RuntimeError("too many have no score")

    with pytest.raises(RuntimeError, match="too many have no score"):
        asyncio.run(ask_all(questions(prompts, 6, set()), Policy().answer, refuse, at_once=2, batch=8))
