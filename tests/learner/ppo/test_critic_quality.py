"""Figures of a critic, compared with loops over tokens and with numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learner.ppo.critic_quality import Bin, calibration, calibration_error, critic_quality, explained_variance
from tests.critic_figures import figures

LENGTHS = (5, 0, 1, 2, 3, 11, 4)


def ragged(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, returns, scores and mask of responses with LENGTHS tokens, NaN in the padding."""
    rng = np.random.default_rng(seed)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    values, returns = (
        torch.where(mask, torch.from_numpy(rng.normal(size=mask.shape)).float(), torch.nan) for _ in range(2)
    )
    return values, values * 0.5 + returns, torch.from_numpy(rng.normal(size=len(LENGTHS))).float(), mask


@pytest.mark.parametrize("seed", range(3))
def test_each_figure_by_its_definition(seed):
    values, returns, scores, mask = ragged(seed)
    rows = [[(values[b, t].item(), returns[b, t].item()) for t in range(n)] for b, n in enumerate(LENGTHS)]
    assert critic_quality(values, returns, scores, mask) == pytest.approx(figures(rows, scores.tolist()), abs=1e-6)


@pytest.mark.parametrize(
    ("length", "quarters"),
    [(1, [1]), (2, [1, 3]), (3, [1, 2, 3]), (4, [1, 2, 3, 4]), (5, [1, 1, 2, 3, 4]), (8, [1, 1, 2, 2, 3, 3, 4, 4])],
)
def test_the_quarter_of_each_token(length, quarters):
    # Two equal responses, right at every token; then wrong at one token. Only its quarter gets worse.
    mask = torch.ones(2, length, dtype=torch.bool)
    returns = torch.tensor([[1.0], [3.0]]).expand(2, length)
    for token, quarter in enumerate(quarters):
        values = returns.clone()
        values[:, token] = 2.0
        found = critic_quality(values, returns, torch.zeros(2), mask)
        worse = [q for q in (1, 2, 3, 4) if q in quarters and found[f"value/explained_variance/quarter_{q}"] < 1]
        assert worse == [quarter]


def test_bins_differ_by_one_token_at_most():
    values, returns, _, mask = ragged()
    assert [b.tokens for b in calibration(values, returns, mask)] == [3] * 6 + [2] * 4  # of 26 tokens


def test_fewer_tokens_than_bins_have_a_bin_each():
    values, returns = torch.tensor([[2.0, 1.0]]), torch.tensor([[0.5, 1.5]])
    assert calibration(values, returns, torch.ones(1, 2, dtype=torch.bool)) == [Bin(1.0, 1.5, 1), Bin(2.0, 0.5, 1)]


def test_equal_predictions_have_equal_realised_returns_in_every_bin():
    returns = torch.arange(20.0).reshape(4, 5)
    bins = calibration(torch.full((4, 5), 9.5), returns, torch.ones(4, 5, dtype=torch.bool))
    assert bins == [Bin(9.5, 9.5, 2)] * 10
    assert calibration_error(bins) == 0.0


def test_predictions_that_differ_by_rounding_are_equal():
    mask = torch.ones(4, 5, dtype=torch.bool)
    noise = torch.from_numpy(np.random.default_rng(0).uniform(-1e-6, 1e-6, (4, 5)))
    bins = calibration(9.5 + noise, torch.arange(20.0).reshape(4, 5), mask)
    assert [b.realised for b in bins] == [9.5] * 10


def test_a_constant_shift_is_a_calibration_error_and_no_lost_variance():
    _, returns, scores, mask = ragged(seed=2)
    found = critic_quality(returns - 0.25, returns, scores, mask)
    assert found["value/calibration_error"] == pytest.approx(0.25, abs=1e-6)
    assert found["value/explained_variance/realised"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("shape", [(0, 0), (2, 0), (2, 3)])
def test_without_a_token_every_figure_is_zero(shape):
    nothing = torch.full(shape, torch.nan)
    found = critic_quality(nothing, nothing, torch.ones(shape[0]), torch.zeros(shape, dtype=torch.bool))
    assert set(found.values()) == {0.0}
    assert calibration(nothing, nothing, torch.zeros(shape, dtype=torch.bool)) == []


def test_returns_that_differ_by_rounding_alone_are_not_explained():
    returns = torch.tensor([[0.1, 0.1, 0.1]])
    returns[0, 1] += 1e-8
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert explained_variance(torch.tensor([[1.0, 2.0, 3.0]]), returns, mask) == 0.0


def test_one_response_has_no_variance_at_its_first_token():
    values, returns = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    found = critic_quality(values, returns, torch.tensor([2.0]), torch.ones(1, 2, dtype=torch.bool))
    assert found["value/explained_variance/realised"] == 1.0
    assert found["value/explained_variance/first"] == found["value/score_correlation"] == 0.0
