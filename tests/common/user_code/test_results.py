"""Results of a user's function: which are numbers and figures, and which are errors."""

from __future__ import annotations

import decimal
import fractions
import math

import numpy as np
import pytest
import torch

from common.user_code.errors import UserCodeError
from common.user_code.results import MAX_FIGURES, read_result, read_results


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (3, 3.0),
        (-0.5, -0.5),
        (np.float32(0.25), 0.25),
        (np.int64(7), 7.0),
        (np.array(5), 5.0),
        (np.array([[4.0]]), 4.0),
        (torch.tensor(6.0), 6.0),
        (torch.tensor([2], dtype=torch.bfloat16), 2.0),
        (decimal.Decimal("1.5"), 1.5),
        (fractions.Fraction(1, 4), 0.25),
    ],
)
def test_numbers_of_numpy_torch_and_python_are_scores(value, score):
    assert read_result(value) == (score, {})


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("0.5", "returned '0.5' (str) where a number is needed"),
        (True, "returned True (bool) where a number is needed"),
        (np.True_, "returned a bool where a number is needed"),
        (torch.tensor([True]), "returned a Tensor where a number is needed"),
        (np.str_("1"), "returned np.str_('1') (str_) where a number is needed"),
        (None, "returned None where a number is needed"),
        (b"1", "returned b'1' (bytes) where a number is needed"),
        (1j, "returned a complex where a number is needed"),
        ([1.0], "returned a list where a number is needed"),
        (np.zeros(2), "returned a ndarray where a number is needed"),
        ((x for x in ()), "returned a generator where a number is needed"),
        (float("nan"), "returned nan"),
        (float("-inf"), "returned -inf"),
        (10**400, "returned inf"),
        (decimal.Decimal("sNaN"), "returned nan"),
        (3.5e38, "returned 3.5e+38, which float32 cannot hold"),
        ({"reward": 1.0}, "returned a dict without \"score\" (its keys: 'reward')"),
        ({"score": "1"}, "returned '1' (str) where a number is needed"),
        ({"score": 1, "format": "ok"}, "returned 'ok' (str) for 'format' where a number is needed"),
    ],
)
def test_a_score_must_be_a_finite_number(value, reason):
    found = read_result(value)
    assert isinstance(found, UserCodeError)
    assert found.reason == reason


def test_a_coroutine_is_no_score_and_is_closed():
    async def awaited() -> float:
        return 2.0

    found = read_result(awaited())  # a coroutine that nobody closes would warn, and fail the suite
    assert isinstance(found, UserCodeError)
    assert "declare the function itself with async def" in found.reason


def test_a_dict_gives_a_score_and_figures():
    given = {"score": np.float64(0.5), "format_ok": True, "length": torch.tensor(3), "depth": None, "ratio": math.nan}
    assert read_result(given) == (0.5, {"format_ok": 1.0, "length": 3.0})


@pytest.mark.parametrize("key", ["a b", "a/b", "", "ü", "x\n", "9", 3, "x" * 65])
def test_a_figure_must_have_a_name_that_a_metric_can_have(key):
    found = read_result({"score": 1.0, key: 1.0})
    assert isinstance(found, UserCodeError)
    assert "a figure's name begins with a letter and has at most 64 letters, digits, _ and -" in found.reason


def test_the_number_of_figures_is_bounded():
    figures = {f"f{i}": 1.0 for i in range(MAX_FIGURES)}
    assert read_result({"score": 1.0, **figures}) == (1.0, figures)
    assert isinstance(read_result({"score": 1.0, **figures, "more": 1.0}), UserCodeError)


def test_a_list_holds_an_outcome_for_each_answer():
    first, second, third = read_results([1, "2", {"score": 3, "x": 4}], 3)
    assert (first, third) == ((1.0, {}), (3.0, {"x": 4.0}))
    assert isinstance(second, UserCodeError)
    assert read_results(np.array([1.0, 2.0]), 2) == [(1.0, {}), (2.0, {})]


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ([1.0], "returned 1 scores for 2 answers"),
        (1.0, "returned a float instead of a list of scores"),
        ("12", "returned '12' [(]str[)] instead of a list of scores"),
        (None, "returned None instead of a list of scores"),
    ],
)
def test_a_list_of_another_length_is_an_error_of_the_whole_call(result, reason):
    with pytest.raises(UserCodeError, match=reason):
        read_results(result, 2)
