"""The figures of evaluation.json, worked by hand or by loops over the answers; the table of them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from statistics import fmean

import numpy as np
import pytest

from common.types import SampleId, Score, Void
from deploy.evaluation.figure_text import number_text
from deploy.evaluation.policies import EvaluationPlan
from deploy.evaluation.record import evaluation_record
from deploy.evaluation.rows import crossover_lines, crossover_text, figure_rows
from deploy.screen.evaluation_table import evaluation_summary
from learner.loop.answers import Answered
from tests.fakes import make_prompt, make_rollout, tiny_config

# Which of the four answers to each of three prompts pass. None: no score.
PASSED = {
    "base": [[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]],
    "mine": [[1, 1, 0, 1], [0, 0, 1, None], [0, 0, 0, 0]],
}


def answered(policy, prompt, sample, passed):
    """A response of prompt + 1 tokens that moved by 0.5 nats each, if it is the trained policy's."""
    sample_id = SampleId(-1, prompt, sample)
    rollout = make_rollout(replace(make_prompt(prompt), sample_id=sample_id), [7] * prompt + [1])
    moved = 0.5 if policy == "mine" else 0.0
    score = Void(sample_id, "no service") if passed is None else Score(2.0 * passed, {"exact": float(passed)})
    return Answered(rollout, score, rollout.rollout_logprobs - np.float32(moved))


@pytest.fixture(scope="module")
def record():
    answers = {
        name: [answered(name, p, s, passed) for p, row in enumerate(rows) for s, passed in enumerate(row)]
        for name, rows in PASSED.items()
    }
    plan = EvaluationPlan({"base": "m", "mine": "runs/mine"}, 4)
    return evaluation_record(tiny_config("m"), plan, answers, 3)


def test_pass_at_k_is_the_mean_over_prompts_of_the_sets_that_pass(record):
    for name, rows in PASSED.items():
        for k, figure in enumerate(record["policies"][name]["pass_at_k"], start=1):
            shares = [fmean(any(chosen) for chosen in combinations(row, k)) for row in rows]
            assert figure["value"] == pytest.approx(fmean(shares))
            assert figure["interval"][0] <= figure["value"] <= figure["interval"][1]


def test_the_crossover_by_hand(record):
    # pass@1 of the policy is (3/4 + 1/4 + 0) / 3 = 1/3. The base has 1 of 4 for two prompts: pass@k is 2/3 * k/4, so
    # 1/6, 1/3, 1/2, 2/3. At k = 2 it is equal, at k = 3 above.
    mine = record["policies"]["mine"]
    assert mine["crossover"]["value"] == 3
    # Asked k times, the policy has 2/3 from k = 4 on, and more than the base before: it is never beaten.
    assert mine["crossover_equal"]["value"] is None
    assert "crossover" not in record["policies"]["base"]


def test_an_answer_without_a_score_fails_and_has_no_part_in_the_mean_score(record):
    mine = record["policies"]["mine"]
    assert (mine["voids"], mine["void_reason"]) == (1, "no service")
    assert mine["score"]["value"] == pytest.approx(2 * 4 / 11)
    assert mine["components"]["exact"]["value"] == pytest.approx(4 / 11)


def test_kl_and_tokens_are_means_over_answers(record):
    base, mine = record["policies"].values()
    assert mine["kl_per_response"]["value"] == pytest.approx(0.5 * (1 + 2 + 3) / 3)
    assert base["kl_per_response"] == {"value": 0.0, "interval": [0.0, 0.0]}
    assert mine["response_tokens"]["value"] == 2
    assert (record["base"], record["samples"], record["prompts"]) == ("base", 4, 3)
    assert [figures["path"] for figures in record["policies"].values()] == ["m", "runs/mine"]


def test_scores_that_are_not_0_and_1_need_a_threshold():
    answers = {"base": [answered("base", p, s, 0.25 * s) for p in range(3) for s in range(4)]}
    plan = EvaluationPlan({"base": "m"}, 4)
    assert "pass_at_k" not in evaluation_record(tiny_config("m"), plan, answers, 3)["policies"]["base"]
    sources = {"sources": [{"name": "exact", "function": "tests.tasks:a_words"}]}
    cfg = tiny_config("m", reward=sources, evaluation={"pass_source": "exact", "pass_score": 0.5})
    found = evaluation_record(cfg, plan, answers, 3)["policies"]["base"]["pass_at_k"]
    assert [figure["value"] for figure in found] == pytest.approx([1 / 2, 5 / 6, 1, 1])  # two of four pass


def test_the_record_is_json_and_the_same_every_time(record):
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_the_rows_have_every_figure_with_its_interval(record):
    rows = dict(figure_rows(record))
    assert list(rows)[:3] == ["pass@1, %", "pass@2, %", "pass@4, %"]
    assert rows["pass@1, %"][0].startswith("16.7 (0.0, ")
    assert rows["tokens"] == ["2.0 (1.0, 3.0)"] * 2  # 1 of 27 resamples is the shortest prompt three times
    assert rows["without a score"] == ["", "1"]
    assert "cut off, %" in rows


def test_a_figure_that_rounds_to_0_has_no_sign():
    assert number_text({"value": -0.001, "interval": [-0.2, 0.001]}, ".2f") == "0.00 (-0.20, 0.00)"
    assert number_text({"value": 0.25, "interval": None}, "+.3g") == "+0.25"


def test_the_screen_says_where_the_base_overtakes(record):
    once, equal = crossover_lines(record)
    found = record["policies"]["mine"]["crossover"]
    low, high = (k or "none up to 4" for k in found["interval"])
    assert once == (
        "The base, asked k times, beats mine, asked once: from k = 3 on (95 % interval "
        f"{low} to {high}; in {found['share']:.1%} of the resamples)"
    )
    assert equal.startswith("The base beats mine if both are asked k times: no crossover up to k = 4 (")
    assert evaluation_summary(record)[1:] == [once, equal]


def test_a_missing_crossover_says_how_many_resamples_have_one():
    found = {"value": None, "interval": [60, None], "share": 0.4, "up_to": 128}
    assert crossover_text(found) == "no crossover up to k = 128 (40.0% of the resamples have one, from k = 60 on)"
    found |= {"interval": [None, None], "share": 0.01}
    assert crossover_text(found) == "no crossover up to k = 128 (1.0% of the resamples have one)"


def test_one_answer_to_each_prompt_has_one_interval_of_pass_at_1():
    answers = {"p": [answered("base", p, 0, passed) for p, passed in enumerate([0, 1, 1, None, 1])]}
    record = evaluation_record(tiny_config("m"), EvaluationPlan({"p": "p"}, 1), answers, 5)
    [figure] = record["policies"]["p"]["pass_at_k"]
    assert figure["value"] == record["pass_at_1"] == 3 / 5
    assert figure["interval"] == pytest.approx(record["interval"])
    assert record["policies"]["p"]["response_tokens"]["value"] == record["response_tokens"]
