"""Variances with intervals against loops over tokens and over batches that are really put together."""

from __future__ import annotations

import numpy as np
import pytest

from learner.evaluation.bootstrap import RESAMPLES
from learner.variance.figures import Resampled, explained_account, figure, variance_account
from tests.critic_figures import PARTS

GROUPS = np.array([5, 5, 9, 9, 9, 2, 7, 7])
LENGTHS = [3, 1, 0, 4, 2, 4, 1, 3]
MASK = np.arange(4) < np.array(LENGTHS)[:, None]


def padded(seed: int) -> np.ndarray:
    """[8, 4] with garbage in the padding."""
    x = np.random.default_rng(seed).normal(2, 1, MASK.shape).astype(np.float32)
    return np.where(MASK, x, np.nan).astype(np.float32)


def tokens(x: np.ndarray, rows: list[int]) -> list[float]:
    return [float(x[row, t]) for row in rows for t in range(LENGTHS[row])]


def drawn_rows(seed: int) -> list[list[int]]:
    """The rows of each drawn batch: every prompt as often as the draw says, with all of its responses."""
    draws = np.random.default_rng(seed).multinomial(4, [0.25] * 4, size=RESAMPLES)
    prompts = sorted(set(GROUPS.tolist()))
    return [
        [row for prompt, times in zip(prompts, draw, strict=True) for _ in range(times) for row in range(8)
         if GROUPS[row] == prompt]
        for draw in draws
    ]  # fmt: skip


def test_a_variance_has_an_interval_from_batches_of_drawn_prompts():
    x = padded(0)
    found = figure(Resampled(GROUPS, seed=3).variance(x, MASK))
    assert found["value"] == pytest.approx(np.var(tokens(x, list(range(8)))))
    every = [np.var(tokens(x, rows)) for rows in drawn_rows(3)]
    assert found["interval"] == pytest.approx(np.percentile(every, [2.5, 97.5]).tolist())


def test_large_numbers_lose_no_digits():
    x = padded(0).astype(np.float64) + 1e7
    assert Resampled(GROUPS, seed=0).variance(x, MASK)[0] == pytest.approx(np.var(tokens(x, list(range(8)))), rel=1e-6)


def test_advantages_are_compared_with_the_returns_of_the_same_draw():
    returns, advantages = padded(0), padded(1)
    of_returns, found = variance_account({"one": advantages}, returns, MASK, Resampled(GROUPS, seed=3))
    assert of_returns["variance"]["value"] == pytest.approx(np.var(tokens(returns, list(range(8)))))
    assert of_returns["mean"] == pytest.approx(np.mean(tokens(returns, list(range(8)))))
    assert found["one"]["mean"] == pytest.approx(np.mean(tokens(advantages, list(range(8)))))
    shares = [np.var(tokens(advantages, rows)) / np.var(tokens(returns, rows)) for rows in drawn_rows(3)]
    assert found["one"]["of_returns"]["interval"] == pytest.approx(np.percentile(shares, [2.5, 97.5]).tolist())


def test_explained_variance_by_position_is_that_of_the_definition():
    returns, values = padded(0), padded(1)
    found = explained_account(values, returns, MASK, Resampled(GROUPS, seed=3))
    assert tuple(found) == PARTS
    first = [(float(returns[row, 0]), float(values[row, 0])) for row in range(8) if LENGTHS[row]]
    share = 1 - np.var([r - v for r, v in first]) / np.var([r for r, _ in first])
    assert found["first"]["explained_variance"]["value"] == pytest.approx(share)
    assert found["first"]["tokens"] == 7
    last = [float(returns[row, LENGTHS[row] - 1]) for row in range(8) if LENGTHS[row]]
    assert found["last"]["returns_variance"]["value"] == pytest.approx(np.var(last))


def test_a_position_without_tokens_has_no_figure():
    mask = MASK.copy()
    mask[:, 1:] = False  # responses of one token: nothing is in the later quarters
    found = explained_account(padded(1), padded(0), mask, Resampled(GROUPS, seed=0))
    assert found["quarter_4"] == {"tokens": 0, "explained_variance": None, "returns_variance": None}
    assert found["first"]["explained_variance"] is not None
