"""Held-out evaluation: every number worked by hand from three answers."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from common.config.ppo import EvaluationConfig
from common.types import Prompt, Rollout, RolloutRef, SampleId, Score, Void
from learner.loop.answers import Answer
from learner.loop.evaluation import Evaluation, evaluate, win_rate
from tests.fakes import FakeRoles, make_prompt, make_rollout

RESPONSES = [[4, 5, 4, 5, 1], [5, 4, 1], [6]]
LOGPROBS = [[-1, -2, -3, -4, -5], [-1, -1, -1], [-2]]
REF_LOGPROBS = [[-1.5, -2, -2, -5, -5], [-3, -2, -1], [-1]]
SCORES = [
    Score(2.0, {"rm": 2.0, "gold": 0.05}),
    Score(-1.0, {"rm": -1.0, "gold": 0.75}),
    Score(0.5, {"rm": 0.5, "gold": -0.2}),
]


class ThreeAnswers(FakeRoles):
    """Answers as in the tables above, the first one last."""

    def __init__(self, scores: list[Score | None]) -> None:
        super().__init__([])
        self.scores, self.asked = scores, []

    async def write(self, prompt: Prompt) -> Rollout:
        number = prompt.sample_id.prompt
        self.asked.append(number)
        await asyncio.sleep(0.001 * (3 - number))
        rollout = make_rollout(prompt, RESPONSES[number], version=7)
        return replace(rollout, rollout_logprobs=np.array(LOGPROBS[number], dtype=np.float32))

    async def score(self, ref: RolloutRef) -> Score | Void:
        raise AssertionError("held-out answers are judged, not only scored")

    async def judge(self, ref: RolloutRef) -> Score | Void:
        return self.scores[ref.sample_id.prompt] or Void(ref.sample_id, "no service")

    async def measure(self, rollout: Rollout) -> np.ndarray:
        return np.array(REF_LOGPROBS[rollout.prompt.sample_id.prompt], dtype=np.float32)


def evaluated(
    scores: list[Score | None] = SCORES, *, prompts: int = 3, **settings: Any
) -> tuple[Evaluation, list[Answer], ThreeAnswers]:
    roles = ThreeAnswers(scores)
    asked = [replace(make_prompt(i), sample_id=SampleId(-1, i, 0)) for i in range(prompts)]
    found = asyncio.run(evaluate(asked, roles, roles, roles, EvaluationConfig(**settings), policy_version=7))
    return *found, roles


def test_kl_from_the_reference_is_per_response_and_signed():
    # Sums of the differences: 0.5 + 0 - 1 + 1 + 0 = 0.5; 2 + 1 + 0 = 3; -1. Their mean is 2.5 / 3.
    assert evaluated()[0].kl_per_response == pytest.approx(2.5 / 3, abs=1e-6)


def test_tokens_and_distinct_ngrams_are_over_all_answers_together():
    # 9 tokens, of which 4 5 1 6 differ. 45 54 45 51, 54 41, none: six pairs, four different; none spans two answers.
    found = evaluated()[0]
    assert (found.response_tokens, found.distinct_1, found.distinct_2) == (3.0, 4 / 9, 4 / 6)


def test_components_include_judges_and_the_score_is_the_total():
    found = evaluated()[0]
    assert found.components == pytest.approx({"rm": 0.5, "gold": 0.2}, abs=1e-12)
    assert found.score == 0.5
    assert (found.policy_version, found.prompts, found.voids) == (7, 3, 0)


def check_passed(evaluation: Evaluation, passed: int) -> None:
    """Of three answers, by Wilson: both ends p of the interval have (passed / 3 - p)^2 = 1.96^2 p (1 - p) / 3."""
    assert evaluation.pass_at_1 == passed / 3
    for end in evaluation.interval:
        assert (passed / 3 - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / 3, abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "passed"),
    [
        ({"pass_source": "rm"}, 2),  # at least 0.5: 2 and 0.5
        ({"pass_source": "rm", "pass_score": -1}, 3),
        ({"pass_source": "gold", "pass_score": 0.05}, 2),
        ({"pass_source": "gold", "pass_score": 0.06}, 1),
    ],
)
def test_a_source_or_a_judge_says_what_passes(settings, passed):
    check_passed(evaluated(**settings)[0], passed)


def test_other_scores_than_0_and_1_pass_only_by_a_named_source():
    found = evaluated()[0]
    assert (found.pass_at_1, found.interval) == (None, None)
    exact = [Score(5.0, {"exact": value, "rm": 2.5}) for value in (1.0, 0.0, 1.0)]
    check_passed(evaluated(exact)[0], 2)
    check_passed(evaluated(exact, pass_source="rm")[0], 3)
    assert evaluated([*exact[:2], Score(0.0, {"exact": 0.5, "rm": 0.0})])[0].pass_at_1 is None


@pytest.mark.parametrize(
    ("before", "after", "share"),
    [
        ([0.0, 0.5, 1.0, 2.0], [1.0, 0.4, 1.0, 3.0], 2.5 / 4),  # higher, lower, the same, higher
        ([0.0, None, 1.0], [1.0, 1.0, None], 1.0),  # only the first was scored twice
        ([None], [1.0], None),
        ([], [], None),
    ],
)
def test_the_win_rate_counts_ties_half_and_leaves_out_what_has_no_score(before, after, share):
    assert win_rate(before, after) == share


def test_an_answer_without_a_score_fails_and_counts_in_no_other_figure():
    found = evaluated([SCORES[0], None, SCORES[2]], pass_source="rm")[0]
    assert (found.prompts, found.voids) == (3, 1)
    check_passed(found, 2)
    assert found.score == 1.25  # of two
    assert found.components == pytest.approx({"rm": 1.25, "gold": -0.075}, abs=1e-12)
    assert found.kl_per_response == pytest.approx((0.5 - 1) / 2)
    # 4 5 4 5 1 and 6: 4 of 6 tokens differ, and 45 54 51 of the four pairs.
    assert (found.response_tokens, found.distinct_1, found.distinct_2) == (3.0, 4 / 6, 3 / 4)


def test_a_judge_that_fails_leaves_the_other_figures_unchanged():
    failed = Score(-1.0, {"rm": -1.0}, judge_voids={"gold": Void(SampleId(-1, 1, 0), "no judge")})
    found, whole = evaluated([failed, *SCORES[1:]], pass_source="rm")[0], evaluated([*SCORES], pass_source="rm")[0]
    assert found.components["gold"] == pytest.approx((0.75 - 0.2) / 2)
    assert found.component_stds["gold"] == pytest.approx((0.75 + 0.2) / 2)
    assert (found.judge_voids, found.judge_void_reasons) == ({"gold": 1}, {"gold": "no judge"})
    assert (whole.judge_voids, whole.judge_void_reasons) == ({}, {})
    assert (found.voids, found.kl_per_response, found.distinct_2) == (0, whole.kl_per_response, whole.distinct_2)
    check_passed(found, 1)  # by the reward model: 0.5 of -1, -1 and 0.5
    check_passed(evaluated([failed, *SCORES[1:]], pass_source="gold")[0], 1)  # 0.75: no score is no pass


def test_no_score_at_all_and_no_prompt_at_all_are_no_error():
    found = evaluated([None] * 3)[0]
    assert (found.voids, found.pass_at_1, found.score, found.components) == (3, 0.0, 0.0, {})
    found, answers, _ = evaluated(prompts=0)
    assert (found.prompts, found.pass_at_1, found.interval, found.kl_per_response) == (0, 0.0, (0.0, 1.0), 0.0)
    assert answers == []


def test_every_prompt_is_asked_once_and_its_answer_comes_back_in_its_place():
    _, answers, roles = evaluated([SCORES[0], None, SCORES[2]])
    assert sorted(roles.asked) == [0, 1, 2]
    assert [rollout.response_ids.tolist() for rollout, _ in answers] == RESPONSES
    assert [score for _, score in answers] == [SCORES[0], Void(SampleId(-1, 1, 0), "no service"), SCORES[2]]


def test_a_record_survives_json():
    for scores, settings in ((SCORES, {}), (SCORES, {"pass_source": "gold"}), ([None] * 3, {})):
        found = evaluated(scores, **settings)[0]
        assert Evaluation.from_record(json.loads(json.dumps(found.record()))) == found


def test_without_a_reference_the_policy_is_its_own_and_has_no_kl():
    roles = ThreeAnswers(SCORES)
    asked = [replace(make_prompt(i), sample_id=SampleId(-1, i, 0)) for i in range(3)]
    found, answers = asyncio.run(evaluate(asked, roles, roles, None, EvaluationConfig(), policy_version=7))
    assert found == replace(evaluated()[0], kl_per_response=0.0)
    assert [score for _, score in answers] == SCORES
