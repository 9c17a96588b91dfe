"""Figures of inner products against their definitions, computed from the gradients themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from learner.variance.noise import direction, noise, noise_against

T_975 = {3: 3.18245, 7: 2.36462, 15: 2.13145}  # of printed tables, by degrees of freedom
PARTS = 8


def gradients(seed: int, *, parts: int = PARTS, signal: float = 1.0) -> np.ndarray:
    """[parts, 50]: the same true gradient in each, and noise that differs from weight to weight."""
    rng = np.random.default_rng(seed)
    true = np.random.default_rng(99).normal(size=50) * signal
    return true + rng.normal(size=(parts, 50)) * np.linspace(0.5, 3, 50)


def products(g: np.ndarray, other: np.ndarray | None = None) -> np.ndarray:
    return g @ (g if other is None else other).T


def trace_of_mean(g: np.ndarray) -> float:
    """The trace of the covariance matrix of the mean of the rows, unbiased."""
    return float(np.trace(np.cov(g.T)) / len(g))


def relative(g: np.ndarray) -> float:
    return trace_of_mean(g) / float(np.sum(g.mean(0) ** 2))


def jackknife(value: float, without: list[float]) -> tuple[float, float]:
    """value +/- t * standard error; `without`: the value without each part."""
    count = len(without)
    error = math.sqrt((count - 1) / count * sum((x - sum(without) / count) ** 2 for x in without))
    return value - T_975[count - 1] * error, value + T_975[count - 1] * error


def left_out(g: np.ndarray) -> list[np.ndarray]:
    return [np.delete(g, part, axis=0) for part in range(len(g))]


def test_the_noise_follows_from_the_gradients_themselves():
    g = gradients(0)
    found = noise(products(g), responses=64)
    assert found["gradient_norm"] == pytest.approx(np.linalg.norm(g.mean(0)))
    assert found["standard_error"] == pytest.approx(math.sqrt(trace_of_mean(g)))
    pairs = [g[m] @ g[n] for m in range(PARTS) for n in range(PARTS) if m != n]
    assert found["signal"] == pytest.approx(np.mean(pairs))
    low, high = (
        math.exp(end) for end in jackknife(math.log(relative(g)), [math.log(relative(x)) for x in left_out(g)])
    )
    error, scale = found["relative_standard_error"], found["noise_scale"]
    assert error["value"] == pytest.approx(math.sqrt(relative(g)))
    assert error["interval"] == pytest.approx([math.sqrt(low), math.sqrt(high)], rel=1e-4)
    assert scale["value"] == pytest.approx(64 * trace_of_mean(g) / np.mean(pairs))
    assert scale["interval"] == pytest.approx([64 * low / (1 - low), 64 * high / (1 - high)], rel=1e-3)


def test_the_unit_of_the_advantages_does_not_change_the_relative_noise():
    g = gradients(1)
    found, other = noise(products(g), 64), noise(products(1000 * g), 64)
    assert other["standard_error"] == pytest.approx(1000 * found["standard_error"])
    for figure in ("relative_standard_error", "noise_scale"):
        assert other[figure]["value"] == pytest.approx(found[figure]["value"])
        assert other[figure]["interval"] == pytest.approx(found[figure]["interval"])


def test_a_comparison_leaves_out_the_noise_that_both_share():
    """Noise of 0.7 times the size in the same parts: the noise scale is nearly 0.49 times as large in each."""
    true, g = gradients(2).mean(0), gradients(2)
    other = true + 0.7 * (g - true)

    def odds(x: np.ndarray) -> float:
        return relative(x) / (1 - relative(x))

    found = noise_against(products(other), products(g))
    assert found["value"] == pytest.approx(odds(other) / odds(g))
    pairs = zip(left_out(other), left_out(g), strict=True)
    ends = jackknife(math.log(odds(other) / odds(g)), [math.log(odds(a) / odds(b)) for a, b in pairs])
    assert found["interval"] == pytest.approx([math.exp(end) for end in ends], rel=1e-4)
    wide = noise(products(g), 64)["noise_scale"]["interval"]
    assert math.log(found["interval"][1] / found["interval"][0]) < 0.5 * math.log(wide[1] / wide[0])


def test_the_direction_is_that_of_the_true_gradients():
    g, h = gradients(3), gradients(4)  # noise is independent, and the true gradient the same
    found = direction(products(g), products(h), products(g, h))
    pairs = [(m, n) for m in range(PARTS) for n in range(PARTS) if m != n]
    inner, own, other = (np.mean([x[m] @ y[n] for m, n in pairs]) for x, y in ((g, h), (g, g), (h, h)))
    expected = inner / math.sqrt(own * other)
    assert found["value"] == pytest.approx(min(1.0, expected))
    assert found["interval"][0] < 1 <= found["interval"][1] + 1e-9
    plain = g.mean(0) @ h.mean(0) / np.linalg.norm(g.mean(0)) / np.linalg.norm(h.mean(0))
    assert plain < 0.8 < expected  # noise makes the cosine of the means smaller


def test_without_a_signal_there_is_no_noise_scale():
    g = gradients(5, signal=0.0)
    g -= g.mean(0) * 0.99  # the parts almost cancel
    found = noise(products(g), 64)
    assert found["signal"] < 0
    assert found["noise_scale"] is None
    assert noise_against(products(g), products(gradients(5))) is None
    assert direction(products(g), products(g), products(g)) is None


def test_an_upper_end_beyond_the_gradients_norm_is_open():
    g = gradients(6, signal=0.4)
    found = noise(products(g), 64)
    assert found["relative_standard_error"]["interval"][1] > 1
    assert found["noise_scale"]["interval"][1] is None


def test_gradients_of_zero_have_no_noise():
    found = noise(np.zeros((4, 4)), 64)
    assert found["relative_standard_error"] is found["noise_scale"] is None
    assert (found["gradient_norm"], found["standard_error"]) == (0, 0)


def test_estimates_are_unbiased_and_intervals_contain_the_truth():
    """400 batches whose true figures are known: trace 1, signal 1, so the relative error is sqrt(1 / 2)."""
    rng, true = np.random.default_rng(0), np.zeros(60)
    true[0] = 1.0
    signals, traces, inside = [], [], 0
    for _ in range(400):
        noisy = rng.normal(size=(16, 60)) * np.sqrt(rng.exponential(size=(16, 1)) * 16 / 60)  # some parts are wild
        found = noise(products(true + noisy), 16)
        signals.append(found["signal"])
        traces.append(found["standard_error"] ** 2)
        low, high = found["relative_standard_error"]["interval"]
        inside += low <= math.sqrt(0.5) <= high
    assert np.mean(signals) == pytest.approx(1, abs=3 * np.std(signals) / 20)
    assert np.mean(traces) == pytest.approx(1, abs=3 * np.std(traces) / 20)
    assert 0.91 < inside / 400 < 0.99
