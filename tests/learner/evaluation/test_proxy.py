"""The training reward against judges: means, changes and correlations, against loops."""

import statistics

import numpy as np
import pytest

from learner.evaluation.bootstrap import Bootstrap
from learner.evaluation.proxy import JudgedAnswers, change, correlation, proxy_record

RANDOM = np.random.default_rng(2)
PROMPTS = np.arange(60).repeat(2)
OF_PROMPTS = Bootstrap(60, seed=0)


def judged(proxy, **judges):
    return JudgedAnswers(PROMPTS, np.asarray(proxy, float), {name: np.asarray(s, float) for name, s in judges.items()})


BASE = judged(RANDOM.normal(size=120), good=RANDOM.normal(size=120), harsh=RANDOM.normal(size=120))
OVERDONE = judged(
    BASE.proxy + 2 + RANDOM.normal(size=120),
    good=BASE.judges["good"] + RANDOM.normal(size=120) / 10,
    harsh=BASE.judges["harsh"] - 1 + RANDOM.normal(size=120),
)


def test_a_judge_that_falls_while_the_proxy_rises_is_flagged():
    record = proxy_record(OVERDONE, BASE, OF_PROMPTS)
    assert record["proxy"]["score"]["value"] == pytest.approx(statistics.fmean(OVERDONE.proxy.tolist()))
    assert record["proxy"]["change"]["value"] == pytest.approx(np.mean(OVERDONE.proxy - BASE.proxy))
    flags = {name: judge["proxy_rose_judge_fell"] for name, judge in record["judges"].items()}
    assert flags == {"good": False, "harsh": True}
    # The other way round the proxy falls and the judge rises, and a policy has not moved from itself.
    back = proxy_record(BASE, OVERDONE, OF_PROMPTS)["judges"]
    same = proxy_record(BASE, BASE, OF_PROMPTS)["judges"]
    assert not any(judge["proxy_rose_judge_fell"] for judge in [*back.values(), *same.values()])


def test_figures_of_a_judge_are_of_the_answers_that_it_scored():
    some = RANDOM.random(120) < 0.7
    partly = judged(OVERDONE.proxy, harsh=np.where(some, OVERDONE.judges["harsh"], np.nan))
    found, whole = (proxy_record(answers, BASE, OF_PROMPTS) for answers in (partly, OVERDONE))
    assert found["proxy"] == whole["proxy"]
    scores, own_proxy = OVERDONE.judges["harsh"][some].tolist(), OVERDONE.proxy[some].tolist()
    harsh = found["judges"]["harsh"]
    assert harsh["answers"] == len(scores) < whole["judges"]["harsh"]["answers"] == 120
    assert harsh["score"]["value"] == pytest.approx(statistics.fmean(scores))
    assert harsh["correlation"]["value"] == pytest.approx(statistics.correlation(own_proxy, scores))
    assert harsh["change"]["value"] == pytest.approx(statistics.fmean(scores) - np.mean(BASE.judges["harsh"]))


def test_the_base_has_scores_and_correlations_but_no_change():
    record = proxy_record(BASE, None, OF_PROMPTS)
    assert set(record["proxy"]) == {"score"}
    assert set(record["judges"]["good"]) == {"answers", "score", "correlation"}


def test_the_same_prompts_make_the_interval_of_a_change_narrow():
    """Every answer gained exactly 1 on the base's answer to its prompt, though prompts differ a lot."""
    scores = RANDOM.normal(size=60).repeat(2) * 100
    found = change(PROMPTS, scores + 1, PROMPTS, scores, OF_PROMPTS)
    assert found["interval"] == pytest.approx([1, 1])


def test_a_change_counts_each_answer_that_has_a_score():
    found = change(
        np.array([0, 0, 1]), np.array([1.0, 2, 6]), np.array([0, 2]), np.array([1.0, 2]), Bootstrap(3, seed=0)
    )
    assert found["value"] == pytest.approx(9 / 3 - 3 / 2)


def test_the_correlation_is_that_of_the_standard_library():
    x, y = RANDOM.normal(size=120) + 1e6, RANDOM.normal(size=120)
    y = y + 0.5 * (x - 1e6)
    found = correlation(PROMPTS, x, y, OF_PROMPTS)
    assert found["value"] == pytest.approx(statistics.correlation(x.tolist(), y.tolist()), abs=1e-9)
    # Fisher's interval for 120 independent pairs: tanh(artanh(r) +- 1.96 / sqrt(117)).
    low, high = np.tanh(np.arctanh(found["value"]) + np.array([-1.96, 1.96]) / np.sqrt(117))
    assert found["interval"] == pytest.approx([low, high], abs=0.04)


def test_scores_that_do_not_vary_have_no_correlation():
    same, other = np.full(120, 0.1), RANDOM.normal(size=120)
    assert correlation(PROMPTS, same, other, OF_PROMPTS) == {"value": None, "interval": None}
    assert correlation(PROMPTS[:0], same[:0], same[:0], OF_PROMPTS) == {"value": None, "interval": None}
