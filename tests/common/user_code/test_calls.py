"""A user's function: which are refused and why, and which results are numbers."""

from __future__ import annotations

import asyncio
import decimal
import fractions
import functools
import math
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from common.reward_input import RewardInput
from common.user_code.calls import (
    FIGURES,
    Form,
    UserCodeError,
    call,
    call_async,
    find_function,
    form_of,
    outcome,
    outcomes,
)

ANSWER = RewardInput("question", "yes", 2, "stop", {})
ONE, MANY = Form(), Form(takes_list=True)


class Grader:
    def __call__(self, answer: RewardInput) -> float:
        return 1.0


class AsyncGrader:
    async def __call__(self, answer: RewardInput) -> float:
        return 1.0


def plain(answer):
    return 1


def with_options(answer: RewardInput, strict: bool = False, *, scale: float = 1.0, **kwargs) -> float:
    return 1


def takes_anything(*args, **kwargs):
    return 1


def listed(answers: list[RewardInput]) -> list[float]:
    return [1.0 for _ in answers]


def sequence(answers: Sequence[RewardInput]) -> list[float]:
    return [1.0 for _ in answers]


def unknown_annotation(answers: list[NotImported]) -> list[float]:  # noqa: F821
    return [1.0 for _ in answers]


async def awaited(answer: RewardInput) -> float:
    await asyncio.sleep(0)
    return 2.0


def noargs():
    return 1


def trl(prompts, completions, **kw):
    return [1.0]


def trl_short(completions, **kw):
    return [1.0]


def keyword_only(*, answer):
    return 1


def generator(answer):
    yield 1.0


async def async_generator(answer):
    yield 1.0


def raises(answer: RewardInput) -> float:
    return answer.respnse


def exits(answer: RewardInput) -> float:
    raise SystemExit(3)


def wrapper(answer: RewardInput) -> float:
    return awaited(answer)


# Signatures


@pytest.mark.parametrize(
    ("function", "form"),
    [
        (plain, ONE),
        (with_options, ONE),
        (takes_anything, ONE),
        (lambda answer: 1, ONE),
        (Grader(), ONE),
        (Grader().__call__, ONE),
        (functools.partial(with_options, strict=True), ONE),
        (listed, MANY),
        (sequence, MANY),
        (unknown_annotation, MANY),
        (awaited, Form(is_async=True)),
        (AsyncGrader(), Form(is_async=True)),
    ],
)
def test_the_signature_says_how_a_function_is_called(function, form):
    assert form_of(function) == form


def test_a_setting_overrides_the_annotation():
    assert form_of(plain, "list") == MANY
    assert form_of(listed, "answer") == ONE


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (noargs, r"takes \(\), but is called with one RewardInput.*too many positional"),
        (trl, r"takes \(prompts, completions, \*\*kw\), but .*missing.*functions for TRL take lists"),
        (trl_short, r"takes \(completions, \*\*kw\), but .*functions for TRL take lists"),
        (keyword_only, r"takes \(\*, answer\), but is called with one RewardInput"),
        (generator, "is a generator function"),
        (async_generator, "is a generator function"),
        (Grader, "is a class"),
        (math.sqrt, "is built into Python"),
        (len, "is built into Python"),
    ],
)
def test_a_function_that_no_answer_can_be_given_to_is_refused(function, reason):
    with pytest.raises(UserCodeError, match=reason):
        form_of(function)


# Results


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
def test_numbers_numpy_scalars_and_arrays_of_one_element_are_scores(value, score):
    assert outcome(value) == (score, {})


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
        (3.5e38, "returned 3.5e+38, which float32 cannot hold"),
        ({"reward": 1.0}, "returned a dict without \"score\" (its keys: 'reward')"),
        ({"score": "1"}, "returned '1' (str) where a number is needed"),
        ({"score": 1, "format": "ok"}, "returned 'ok' (str) for 'format' where a number is needed"),
    ],
)
def test_what_is_no_finite_number_is_a_fault(value, reason):
    found = outcome(value)
    assert isinstance(found, UserCodeError)
    assert found.reason == reason


def test_a_coroutine_is_no_score_and_is_closed():
    found = outcome(wrapper(ANSWER))  # a coroutine that nobody closed would warn, and the suite fail
    assert isinstance(found, UserCodeError)
    assert "declare the function itself with async def" in found.reason


def test_a_dict_gives_a_score_and_figures():
    given = {"score": np.float64(0.5), "format_ok": True, "length": torch.tensor(3), "depth": None, "ratio": math.nan}
    assert outcome(given) == (0.5, {"format_ok": 1.0, "length": 3.0})


@pytest.mark.parametrize("key", ["a b", "a/b", "", "ü", "x\n", "9", 3, "x" * 65])
def test_a_figure_must_have_a_name_that_a_metric_can_have(key):
    found = outcome({"score": 1.0, key: 1.0})
    assert isinstance(found, UserCodeError)
    assert "a figure's name has letters, digits, _ and - only" in found.reason


def test_the_number_of_figures_is_bounded():
    figures = {f"f{i}": 1.0 for i in range(FIGURES)}
    assert outcome({"score": 1.0, **figures}) == (1.0, figures)
    assert isinstance(outcome({"score": 1.0, **figures, "more": 1.0}), UserCodeError)


def test_a_list_holds_an_outcome_for_each_answer():
    first, second, third = outcomes([1, "2", {"score": 3, "x": 4}], MANY, 3)
    assert (first, third) == ((1.0, {}), (3.0, {"x": 4.0}))
    assert isinstance(second, UserCodeError)
    assert outcomes(np.array([1.0, 2.0]), MANY, 2) == [(1.0, {}), (2.0, {})]


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ([1.0], "returned 1 scores for 2 answers"),
        (1.0, "returned a float where a list of scores is needed"),
        ("12", "returned '12' [(]str[)] where a list of scores is needed"),
        (None, "returned None where a list of scores is needed"),
    ],
)
def test_a_list_of_another_length_or_none_is_a_fault_of_the_whole_call(result, reason):
    with pytest.raises(UserCodeError, match=reason):
        outcomes(result, MANY, 2)


# Calls


def test_what_a_function_raises_is_told_with_file_and_line_and_its_own_traceback():
    with pytest.raises(UserCodeError) as caught:
        call(raises, ONE, [ANSWER])
    line = raises.__code__.co_firstlineno + 1
    where = f"(test_calls.py, line {line})"
    assert caught.value.reason == f"raised AttributeError: 'RewardInput' object has no attribute 'respnse' {where}"
    assert caught.value.fault == f"raised AttributeError {where}"
    assert "return answer.respnse" in caught.value.details
    assert "calls.py" not in caught.value.details.replace("test_calls.py", "")


@pytest.mark.parametrize(
    "error", [SystemExit(0), KeyboardInterrupt(), GeneratorExit(), StopIteration(), TimeoutError()]
)
def test_whatever_a_function_raises_is_a_fault_of_it(error):
    def function(answer):
        raise error

    async def async_function(answer):
        raise error

    with pytest.raises(UserCodeError, match=f"raised {type(error).__name__}"):
        call(function, ONE, [ANSWER])
    if not isinstance(error, StopIteration):  # Python itself turns that into a RuntimeError
        with pytest.raises(UserCodeError, match=f"raised {type(error).__name__}"):
            asyncio.run(call_async(async_function, Form(is_async=True), [ANSWER]))


def test_an_async_function_that_cancels_itself_is_a_fault_and_a_cancelled_call_is_cancelled():
    async def cancels_itself(answer):
        raise asyncio.CancelledError

    async def waits(answer):
        await asyncio.Event().wait()

    async def scenario():
        with pytest.raises(UserCodeError, match="raised CancelledError"):
            await call_async(cancels_itself, Form(is_async=True), [ANSWER])
        task = asyncio.create_task(call_async(waits, Form(is_async=True), [ANSWER]))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())


def test_a_fault_travels_whole():
    error = pickle.loads(pickle.dumps(UserCodeError("reason", details="trace", fault="same")))
    assert (error.reason, error.details, error.fault, str(error)) == ("reason", "trace", "same", "reason")


# Modules


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import sys\nsys.exit(0)", "it ends the program while it is imported: exit code 0"),
        (
            "from argparse import *\np = ArgumentParser('x')\np.add_argument('--k', required=True)\np.parse_args([])",
            "it ends the program while it is imported: x: error: the following arguments are required: --k",
        ),
        ("raise RuntimeError('no licence')", r"RuntimeError: no licence"),
        ("def f(:", "SyntaxError"),
    ],
)
def test_a_module_that_ends_the_program_or_raises_on_import_is_told_as_such(
    tmp_path, monkeypatch, capfd, source, reason
):
    name = f"user_module_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserCodeError, match=f"module {name} cannot be imported .*{reason}"):
        find_function(f"{name}:f")
    assert capfd.readouterr().err == ""  # argparse's own words are in the message


def test_the_file_that_was_imported_is_named_when_it_has_no_such_function():
    with pytest.raises(UserCodeError, match=rf"module json \({json_file()}\) has no function score"):
        find_function("json:score")


def json_file() -> str:
    import json
    import re

    return re.escape(json.__file__)
