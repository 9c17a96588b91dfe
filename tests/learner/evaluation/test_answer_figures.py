"""The figures of a policy's answers as evaluation.json has them, on answers made by hand."""

from dataclasses import replace

import numpy as np
import pytest

from common.proportions import wilson_interval
from common.types import HELDOUT_EPOCH, SampleId, Score, Turn, Void
from learner.evaluation.answer_figures import figures_of
from learner.evaluation.bootstrap import Bootstrap
from learner.loop.answers import Answered
from tests.fakes import make_prompt, make_rollout

BOOTSTRAP = Bootstrap(2, seed=0)


def answered(prompt, sample, response, score, *, gold=0.0, logprob=-1.0, ref=-1.0):
    sample_id = SampleId(HELDOUT_EPOCH, prompt, sample)
    rollout = make_rollout(replace(make_prompt(prompt), sample_id=sample_id), response, logprob=logprob)
    if score is None:
        given = Void(sample_id, "no")
    elif gold is None:
        given = Score(score, {"rm": score}, judge_voids={"gold": Void(sample_id, "no judge")})
    else:
        given = Score(score, {"rm": score, "gold": gold})
    return Answered(rollout, given, np.full(len(response), ref, dtype=np.float32))


BASE = [answered(0, 0, [4, 5], 0.0, gold=1), answered(0, 1, [4, 6], 1.0, gold=1), answered(1, 0, [7], 0.0, gold=1)]
MINE = [
    answered(0, 0, [4, 5], 2.0, gold=0, logprob=-0.5, ref=-1.5),
    answered(0, 1, [4, 5], 2.0, gold=0, logprob=-0.5, ref=-1.0),
    answered(1, 0, [4, 8, 9], 3.0, gold=0, logprob=-0.25, ref=-1.25),
]


def test_a_policy_is_compared_with_the_base():
    found = figures_of(MINE, BASE, ["gold"], BOOTSTRAP)
    assert found["entropy"]["value"] == pytest.approx((4 * 0.5 + 3 * 0.25) / 7)
    assert found["different_answers"]["value"] == 1 / 2
    # Samples 0: 4 5 and 4 8 9, so 4 different of 5 tokens. Sample 1: 4 5, both different.
    assert found["distinct_1"]["value"] == pytest.approx((4 / 5 + 1) / 2)
    assert [(p["first"], p["tokens"], p["value"]) for p in found["kl_by_position"]] == [
        (0, 3, pytest.approx(2.5 / 3)),
        (1, 3, pytest.approx(2.5 / 3)),
        (2, 1, pytest.approx(1.0)),
    ]
    assert found["proxy"]["change"]["value"] == pytest.approx(7 / 3 - 1 / 3)
    assert found["judges"]["gold"]["change"] == {"value": -1, "interval": [-1, -1]}
    assert found["judges"]["gold"]["proxy_rose_judge_fell"]


def test_answers_without_a_score_do_not_count():
    void = answered(1, 1, [9, 9, 9], None, logprob=0.0, ref=-50.0)
    found = figures_of([*MINE, void], [*BASE, void], ["gold"], BOOTSTRAP)
    assert found == {**figures_of(MINE, BASE, ["gold"], BOOTSTRAP), "voids": 1, "void_reason": "no"}
    assert found["response_tokens"]["value"] == 7 / 3
    assert found["kl_per_response"]["value"] == pytest.approx((2 + 1 + 3) / 3)


def test_what_always_happens_has_an_interval_of_less_than_1():
    found = figures_of(BASE, None, ["gold"], BOOTSTRAP)  # answers made by hand are cut off
    assert found["cut_off"] == {"value": 1, "interval": pytest.approx(wilson_interval(2, 2))}
    assert found["components"]["gold"] == {"value": 1, "interval": pytest.approx(wilson_interval(2, 2))}
    assert found["judges"]["gold"]["score"] == found["components"]["gold"]


def test_the_base_and_one_answer_to_each_prompt_have_fewer_figures():
    found = figures_of([BASE[0], BASE[2]], None, [], BOOTSTRAP)
    assert "different_answers" not in found
    assert set(found["proxy"]) == {"score"}
    assert found["judges"] == {}


def test_no_answer_with_a_score_gives_no_figures_but_no_error():
    voids = [answered(prompt, 0, [], None) for prompt in (0, 1)]
    found = figures_of(voids, voids, ["gold"], BOOTSTRAP)
    assert found["entropy"] == found["proxy"]["change"] == {"value": None, "interval": None}
    assert found["kl_by_position"] == []
    assert not found["judges"]["gold"]["proxy_rose_judge_fell"]


@pytest.mark.parametrize("failed", [1, 2, 3])
def test_a_judge_that_fails_changes_its_own_figures_only(failed):
    whole = figures_of(MINE, BASE, ["gold"], BOOTSTRAP)
    answers = [
        answer._replace(score=answered(0, 0, [4], answer.score.total, gold=None).score) if number < failed else answer
        for number, answer in enumerate(MINE)
    ]
    found = figures_of(answers, BASE, ["gold"], BOOTSTRAP)
    assert found["components"].pop("rm") == whole["components"].pop("rm")
    gold = found["judges"]["gold"]
    assert (gold["answers"], gold["voids"], gold["void_reason"]) == (3 - failed, failed, "no judge")
    assert gold["change"]["value"] == (None if failed == 3 else -1)
    own = ("judges", "components")
    assert {k: v for k, v in found.items() if k not in own} == {k: v for k, v in whole.items() if k not in own}


def test_an_episode_has_the_figures_of_its_sampled_tokens():
    """Those of answers from which the environment's tokens are taken out. But no n-gram spans two messages."""
    plain, episodes = [], []
    for answer in MINE:
        response = answer.rollout.response_ids.tolist()
        plain.append(answer)
        longer = replace(
            answer.rollout,
            response_ids=np.array([response[0], 60, 61, *response[1:]], dtype=np.int32),
            turns=(Turn(1, 3, 1.0), Turn(len(response) + 2, len(response) + 2, 0.0)),
        )
        assert longer.sampled_ids.tolist() == response
        episodes.append(answer._replace(rollout=longer))
    found, expected = (figures_of(answers, BASE, ["gold"], BOOTSTRAP) for answers in (episodes, plain))
    # Samples 0: 4 | 5 and 4 | 8 9, with the pair 8 9 alone. Sample 1: 4 | 5, without a pair.
    assert (found["distinct_2"]["value"], found["distinct_3"]["value"]) == ((1 + 0) / 2, 0)
    ours = ("distinct_2", "distinct_3")
    assert {k: v for k, v in found.items() if k not in ours} == {k: v for k, v in expected.items() if k not in ours}


@pytest.mark.parametrize(
    ("reason", "cut_off"),
    [("stop", 0), ("terminated", 0), ("length", 1), ("truncated", 1), ("max_turns", 1), ("max_tokens", 1)],
)
def test_an_answer_that_a_limit_ended_is_cut_off(reason, cut_off):
    answers = [answer._replace(rollout=replace(answer.rollout, finish_reason=reason)) for answer in MINE]
    assert figures_of(answers, None, [], BOOTSTRAP)["cut_off"]["value"] == cut_off
