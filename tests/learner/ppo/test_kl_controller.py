"""The adaptive KL coefficient, by hand."""

import pytest

from learner.ppo.kl_controller import AdaptiveKL, FixedKL


@pytest.mark.parametrize(
    ("kl", "coef"),
    [
        (6.6, 0.2 * 1.001),  # error 0.1; factor 1 + 0.1 * 100 / 10000
        (5.4, 0.2 * 0.999),  # error -0.1
        (6.0, 0.2),  # on target
        (60.0, 0.2 * 1.002),  # error 9, clipped to 0.2
        (0.0, 0.2 * 0.998),  # error -1, clipped to -0.2
        (-3.0, 0.2 * 0.998),  # a k1 estimate may be negative
    ],
)
def test_the_adaptive_coefficient_follows_the_kl(kl, coef):
    controller = AdaptiveKL(0.2, target=6.0, horizon=10_000)
    controller.update(kl, 100)
    assert controller.coef == pytest.approx(coef, abs=1e-12)


def test_adaptive_changes_compound_and_a_fixed_coefficient_stays():
    adaptive, fixed = AdaptiveKL(0.1, target=2.0, horizon=100), FixedKL(0.1)
    for controller in (adaptive, fixed):
        controller.update(100.0, 50)  # factor 1 + 0.2 * 50 / 100 = 1.1
        controller.update(1.8, 20)  # error -0.1, factor 1 - 0.1 * 20 / 100 = 0.98
    assert adaptive.coef == pytest.approx(0.1078, abs=1e-12)
    assert fixed.coef == 0.1
