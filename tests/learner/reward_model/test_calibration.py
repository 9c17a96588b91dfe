"""Accuracy and calibration of predicted preferences, with numbers worked by hand and pairs from known odds."""

import json
import math

import numpy as np
import pytest

from common.files import append_record, read_records
from learner.reward_model.calibration import Bin, PreferenceEvaluation, evaluate_preferences

LN2, LN3, LN19 = math.log(2), math.log(3), math.log(19)  # differences that predict 2 / 3, 3 / 4 and 19 / 20
DIFFERENCES = [LN3, -LN2, LN19, LN3, 0.0, LN2, -LN3, LN3]


def evaluated(differences) -> PreferenceEvaluation:
    """The evaluation of pairs with these score differences, each with a random origin."""
    differences = np.asarray(differences)
    rejected = np.random.default_rng(0).normal(size=len(differences))
    return evaluate_preferences(rejected + differences, rejected, step=4, epoch=0.5)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The p with (successes / trials - p)^2 = 1.96^2 p (1 - p) / trials: roots of its quadratic in p."""
    share, z2 = successes / trials, 1.96**2 / trials
    low, high = sorted(np.roots([1 + z2, -2 * share - z2, share * share]).real)
    return low, high


def test_bins_and_calibration_error_worked_by_hand():
    # A tie predicts 1/2 and is not right: off by 1/2. ln 2, once each way: 2/3 and 1/2, off by 1/6. ln 3, three ways
    # right and one wrong: 3/4 and 3/4. ln 19, right: off by 1/20. Error (1/2 + 2 * 1/6 + 4 * 0 + 1/20) / 8 = 53/480.
    found = evaluated(DIFFERENCES)
    expected = [(0.5, 0.6, 1, 0.5, 0), (0.6, 0.7, 2, 2 / 3, 1), (0.7, 0.8, 4, 0.75, 3), (0.9, 1.0, 1, 0.95, 1)]
    for entry, (low, high, pairs, predicted, hits) in zip(found.bins, expected, strict=True):
        assert (entry.low, entry.high, entry.pairs) == (low, high, pairs)
        assert (entry.predicted, entry.right) == pytest.approx((predicted, hits / pairs), abs=1e-12)
        assert entry.interval == pytest.approx(wilson(hits, pairs), abs=1e-8)
    assert found.calibration_error == pytest.approx(53 / 480, abs=1e-12)


def test_accuracy_loss_and_margin_worked_by_hand():
    # Right 5 of 8. Probabilities of the preferred side: 3/4 three times, 1/4, 1/3, 2/3, 19/20, 1/2. The loss is
    # the mean -log, and their product is 27/64 * 1/4 * 2/9 * 19/40. Differences add up to 2 ln 3 + ln 19.
    found = evaluated(DIFFERENCES)
    assert (found.step, found.epoch, found.pairs, found.accuracy) == (4, 0.5, 8, 0.625)
    assert found.interval == pytest.approx(wilson(5, 8), abs=1e-8)
    assert found.loss == pytest.approx(-math.log(27 / 64 / 4 * 2 / 9 * 19 / 40) / 8, abs=1e-12)
    assert found.margin == pytest.approx((2 * LN3 + LN19) / 8, abs=1e-12)


def test_ties_are_not_right():
    found = evaluated([0.0] * 3)
    assert (found.accuracy, found.loss, found.calibration_error) == (0.0, pytest.approx(LN2, abs=1e-12), 0.5)
    assert found.bins == (Bin(0.5, 0.6, 3, 0.5, 0.0, found.interval),)


def test_certain_predictions_are_in_the_last_bin_and_stay_finite():
    found = evaluated([1e4, 1e4, 1e4, -1e4])  # one of them certain and wrong: a loss of 1e4
    (entry,) = found.bins
    assert (entry.low, entry.pairs, entry.predicted, entry.right) == (0.9, 4, 1.0, 0.75)
    assert (found.loss, found.calibration_error) == (2500.0, 0.25)


def test_no_pairs_say_nothing():
    found = evaluated([])
    assert (found.pairs, found.accuracy, found.interval, found.bins) == (0, 0.0, (0.0, 1.0), ())


def test_an_evaluation_comes_back_from_its_file(tmp_path):
    found = evaluated(DIFFERENCES)
    append_record(tmp_path / "evaluations.jsonl", found.record())
    (record,) = read_records(tmp_path / "evaluations.jsonl")
    assert PreferenceEvaluation.from_record(record) == found
    assert record == json.loads(json.dumps(found.record()))


def test_a_model_that_knows_the_odds_is_calibrated():
    rng = np.random.default_rng(0)
    odds = rng.normal(0, 1.5, 20_000)  # the model's log-odds of the first response, which come true
    preferred = np.where(rng.random(len(odds)) < 1 / (1 + np.exp(-odds)), odds, -odds)
    found = evaluated(preferred)
    # Some 4,000 pairs a bin, each bin's share with a deviation below sqrt(1/4 / 4,000) = 0.008.
    assert found.calibration_error < 0.01
    assert sum(entry.pairs for entry in found.bins) == found.pairs == 20_000
    for entry in found.bins:
        assert entry.low <= entry.predicted <= entry.high
    # Twice the log-odds: 0.69 becomes 0.83, 0.82 becomes 0.95.
    assert evaluated(2 * preferred).calibration_error > 0.08
    assert evaluated(2 * preferred).accuracy == found.accuracy
    assert evaluated(preferred / 3).calibration_error > 0.08  # too modest is wrong, too
