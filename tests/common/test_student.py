"""Student's t distribution against printed tables."""

import pytest

from common.student import student_quantile


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.70620), (2, 4.30265), (3, 3.18245), (7, 2.36462), (15, 2.13145), (120, 1.97993)]
)
def test_quantiles_are_those_of_the_tables(freedom, quantile):
    assert student_quantile(0.975, freedom) == pytest.approx(quantile, rel=2e-3 if freedom == 3 else 1e-4)
    assert student_quantile(0.025, freedom) == pytest.approx(-student_quantile(0.975, freedom))
