"""Figures of a critic, compared with loops over tokens and with numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from learner.ppo.critic_quality import Bin, calibration, calibration_error, critic_quality, explained_variance

LENGTHS = (5, 0, 1, 2, 3, 11, 4)


def ragged(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, returns, scores and mask of responses with LENGTHS tokens, NaN in the padding."""
    rng = np.random.default_rng(seed)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    values, returns = (
        torch.where(mask, torch.from_numpy(rng.normal(size=mask.shape)).float(), torch.nan) for _ in range(2)
    )
    return values, values * 0.5 + returns, torch.from_numpy(rng.normal(size=len(LENGTHS))).float(), mask


def part_of(token: int, length: int) -> set[str]:
    """The parts that a token is in, by the fraction of the response that is before it."""
    before = token / length
    names = {"realised", "quarter_" + str(1 + sum(before >= bound for bound in (0.25, 0.5, 0.75)))}
    return names | ({"first"} if token == 0 else set()) | ({"last"} if token == length - 1 else set())


def test_each_figure_by_its_definition():
    values, returns, scores, mask = ragged()
    found = critic_quality(values, returns, scores, mask)
    for name in ("realised", "first", "quarter_1", "quarter_2", "quarter_3", "quarter_4", "last"):
        pairs = [
            (values[b, t].item(), returns[b, t].item())
            for b, length in enumerate(LENGTHS)
            for t in range(length)
            if name in part_of(t, length)
        ]
        value, realised = np.array(pairs).T
        expected = 1 - np.var(realised - value) / np.var(realised)
        assert found[f"value/explained_variance/{name}"] == pytest.approx(expected, abs=1e-9), name
        if name == "realised":
            assert found["value/returns_var/realised"] == pytest.approx(np.var(realised), abs=1e-9)
    written = [b for b, length in enumerate(LENGTHS) if length]
    expected = np.corrcoef([values[b, 0] for b in written], [scores[b] for b in written])[0, 1]
    assert found["value/score_correlation"] == pytest.approx(expected, abs=1e-6)


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


def test_ten_bins_by_sorting_the_tokens():
    values, returns, _, mask = ragged(seed=1)
    tokens = sorted((values[b, t].item(), returns[b, t].item()) for b, n in enumerate(LENGTHS) for t in range(n))
    sizes = [3] * 6 + [2] * 4  # 26 tokens
    found = calibration(values, returns, mask)
    assert [b.tokens for b in found] == sizes
    errors = 0.0
    for size, got in zip(sizes, found, strict=True):
        mine, tokens = tokens[:size], tokens[size:]
        assert got.predicted == pytest.approx(sum(v for v, _ in mine) / size, abs=1e-6)
        assert got.realised == pytest.approx(sum(r for _, r in mine) / size, abs=1e-6)
        errors += abs(sum(v - r for v, r in mine))
    assert calibration_error(found) == pytest.approx(errors / 26, abs=1e-6)


def test_fewer_tokens_than_bins_have_a_bin_each():
    values, returns = torch.tensor([[2.0, 1.0]]), torch.tensor([[0.5, 1.5]])
    assert calibration(values, returns, torch.ones(1, 2, dtype=torch.bool)) == [Bin(1.0, 1.5, 1), Bin(2.0, 0.5, 1)]


def test_equal_predictions_have_equal_realised_returns_in_every_bin():
    returns = torch.arange(20.0).reshape(4, 5)
    bins = calibration(torch.full((4, 5), 9.5), returns, torch.ones(4, 5, dtype=torch.bool))
    assert bins == [Bin(9.5, 9.5, 2)] * 10
    assert calibration_error(bins) == 0.0


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
