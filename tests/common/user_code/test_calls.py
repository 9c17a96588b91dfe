"""Finding a user's function and calling it: which functions are refused, and which errors failed calls give."""

from __future__ import annotations

import asyncio
import functools
import math
import pickle
from collections.abc import Sequence

import pytest

from common.reward_input import RewardInput
from common.user_code.calls import CallStyle, call, call_async, call_style, find_function
from common.user_code.errors import UserCodeError

ANSWER = RewardInput("question", "yes", 2, "stop", {})
ONE, MANY = CallStyle(), CallStyle(takes_list=True)


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


# Signatures


@pytest.mark.parametrize(
    ("function", "style"),
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
        (awaited, CallStyle(is_async=True)),
        (AsyncGrader(), CallStyle(is_async=True)),
    ],
)
def test_the_signature_says_how_a_function_is_called(function, style):
    assert call_style(function) == style


def test_a_setting_overrides_the_annotation():
    assert call_style(plain, "list") == MANY
    assert call_style(listed, "answer") == ONE


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
def test_a_function_that_cannot_take_an_answer_is_refused(function, reason):
    with pytest.raises(UserCodeError, match=reason):
        call_style(function)


# Calls


def test_an_error_names_file_and_line_and_has_the_users_traceback():
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
def test_any_exception_of_a_function_becomes_a_user_code_error(error):
    def function(answer):
        raise error

    async def async_function(answer):
        raise error

    with pytest.raises(UserCodeError, match=f"raised {type(error).__name__}"):
        call(function, ONE, [ANSWER])
    if not isinstance(error, StopIteration):  # Python itself turns that into a RuntimeError
        with pytest.raises(UserCodeError, match=f"raised {type(error).__name__}"):
            asyncio.run(call_async(async_function, CallStyle(is_async=True), [ANSWER]))


def test_only_a_cancellation_from_outside_cancels_an_async_call():
    async def cancels_itself(answer):
        raise asyncio.CancelledError

    async def waits(answer):
        await asyncio.Event().wait()

    async def scenario():
        with pytest.raises(UserCodeError, match="raised CancelledError"):
            await call_async(cancels_itself, CallStyle(is_async=True), [ANSWER])
        task = asyncio.create_task(call_async(waits, CallStyle(is_async=True), [ANSWER]))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())


def test_an_error_survives_pickling():
    error = UserCodeError("reason", details="trace", fault="same", permanent=False, missing="numpy")
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found)) == (UserCodeError, "reason")
    assert vars(found) == vars(error)


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
def test_a_module_that_exits_or_raises_on_import_is_refused(tmp_path, monkeypatch, capfd, source, reason):
    name = f"user_module_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserCodeError, match=f"module {name} cannot be imported .*{reason}"):
        find_function(f"{name}:f")
    assert capfd.readouterr().err == ""  # the message has argparse's text instead


def test_a_missing_function_is_reported_with_the_modules_file():
    with pytest.raises(UserCodeError, match=rf"module json \({json_file()}\) has no function score"):
        find_function("json:score")


def json_file() -> str:
    import json
    import re

    return re.escape(json.__file__)
