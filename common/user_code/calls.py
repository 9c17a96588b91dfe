"""A user's reward function: found, its signature looked at, called, and its result made a number. Runs anywhere: only
the standard library, since worker processes of reward functions load this file by its path
(actors/scoring/function_worker.py).

Everything that can go wrong in a user's code is a UserCodeError here, `sys.exit()` included.
"""

from __future__ import annotations

import asyncio
import decimal
import functools
import inspect
import io
import math
import numbers
import os
import re
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType
from typing import Any, TypeAlias, get_origin

Outcome: TypeAlias = "tuple[float, dict[str, float]] | UserCodeError"  # of one answer: score and figures, or the fault
FIGURES = 32  # further figures that a result may hold beside its score
TRACEBACK_CHARS = 20_000
LARGEST = 3.4028234663852886e38  # of float32, which the learner computes in
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_LISTS = re.compile(r"(\w+\.)*(list|List|Sequence|Collection|Iterable)\b")


class UserCodeError(Exception):
    """What a user's code did wrong: `reason` in one line, the traceback where there is one, and `fault`, which is the
    same for every answer that meets the same fault."""

    def __init__(self, reason: str, *, details: str = "", fault: str = "") -> None:
        super().__init__(reason)
        self.reason, self.details, self.fault = reason, details, fault or reason

    def __reduce__(self) -> Any:
        return functools.partial(UserCodeError, details=self.details, fault=self.fault), (self.reason,)


class NotFoundError(UserCodeError):
    """A module that is not there; `missing` is its name, which may be one that the user's module imports."""

    missing = ""


@dataclass(frozen=True)
class Form:
    """How a function is called."""

    is_async: bool = False
    takes_list: bool = False


# Finding it


def find_function(path: str) -> Callable[..., Any]:
    """The function that `module:function` names."""
    module_name, separator, name = path.partition(":")
    if not separator:
        raise UserCodeError("must read module:function, such as deploy.tasks.larger:correct")
    printed = io.StringIO()  # argparse prints why it exits
    try:
        with redirect_stderr(printed):
            module = import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        reason = f"module {module_name} cannot be imported ({_why_not_imported(error, printed.getvalue())})"
        if not isinstance(error, ImportError) and module_name:
            raise UserCodeError(reason, details=text_of(error)) from error
        not_found = NotFoundError(reason, details=text_of(error))
        not_found.missing = getattr(error, "name", None) or module_name
        raise not_found from error
    function = getattr(module, name, None)
    if not callable(function):
        file = getattr(module, "__file__", None) or "built in"
        raise UserCodeError(f"module {module_name} ({file}) has no function {name}")
    return function


def _why_not_imported(error: BaseException, printed: str) -> str:
    if not isinstance(error, SystemExit):
        return f"{type(error).__name__}: {error}"
    last = printed.strip().splitlines()[-1:] or [f"exit code {error.code}"]
    return (
        f"it ends the program while it is imported: {last[0]}; put what a script does, such as sys.exit() or reading "
        'the command line, under `if __name__ == "__main__":`'
    )


# Its signature


def form_of(function: Callable[..., Any], takes: str = "annotated") -> Form:
    """How the function is called. `takes`: answer, list, or annotated, which looks at its parameter's annotation."""
    if inspect.isclass(function):
        raise UserCodeError("is a class; name a function, or an instance of the class that its module makes")
    inner: Any = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    if not inspect.isroutine(inner):
        inner = type(inner).__call__
    if inspect.isbuiltin(inner) and getattr(inner, "__module__", "") in sys.stdlib_module_names:
        raise UserCodeError("is built into Python and cannot take a RewardInput; write a function that calls it")
    if inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner):
        raise UserCodeError("is a generator function (it has a yield); return the score instead")
    is_async = inspect.iscoroutinefunction(inner)
    try:
        signature = _signature(function)
    except (TypeError, ValueError):  # an extension module need not say
        return Form(is_async, takes == "list")
    parameters = list(signature.parameters.values())
    trl = {"prompts", "completions"} & {parameter.name for parameter in parameters}
    try:
        signature.bind(None)
    except TypeError as error:
        raise UserCodeError(_called_with_one(signature, str(error), trl=bool(trl))) from None
    if parameters[0].name in trl:
        raise UserCodeError(_called_with_one(signature, "", trl=True))
    annotated = takes == "annotated" and _is_list(parameters[0].annotation)
    return Form(is_async, takes == "list" or annotated)


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(function, eval_str=True)
    except Exception:  # annotations may name what only a type checker imports
        return inspect.signature(function)


def _called_with_one(signature: inspect.Signature, error: str, *, trl: bool) -> str:
    hint = " (functions for TRL take lists of texts: write one that takes list[RewardInput])" if trl else ""
    why = f" ({error})" if error else ""
    return (
        f"takes {signature}, but is called with one RewardInput, or a list of them{why}{hint}; "
        "write def f(answer: RewardInput) -> float"
    )


def _is_list(annotation: Any) -> bool:
    if isinstance(annotation, str):
        return _LISTS.match(annotation) is not None
    origin = get_origin(annotation) or annotation
    return inspect.isclass(origin) and _LISTS.fullmatch(origin.__name__) is not None


# Calling it


def call(function: Callable[..., Any], form: Form, answers: Sequence[Any]) -> list[Outcome]:
    """An Outcome for each answer. Raises UserCodeError when the call as a whole fails."""
    try:
        result = function(list(answers) if form.takes_list else answers[0])
    except BaseException as error:
        raise failure(error) from error
    return outcomes(result, form, len(answers))


async def call_async(function: Callable[..., Awaitable[Any]], form: Form, answers: Sequence[Any]) -> list[Outcome]:
    """The same, of an async function."""
    task = asyncio.current_task()
    try:
        result = await function(list(answers) if form.takes_list else answers[0])
    except BaseException as error:
        if _from_outside(error, task):
            raise
        raise failure(error) from error
    return outcomes(result, form, len(answers))


def _from_outside(error: BaseException, task: asyncio.Task[Any] | None) -> bool:
    """Whether the call was cancelled, or thrown away unfinished, and did not raise this itself."""
    if isinstance(error, asyncio.CancelledError):
        return task is not None and task.cancelling() > 0
    if isinstance(error, GeneratorExit):
        try:
            return asyncio.current_task() is not task
        except RuntimeError:  # no loop runs any more
            return True
    return False


def failure(error: BaseException) -> UserCodeError:
    """What a function raised, and where."""
    frames = traceback.extract_tb(_own(error.__traceback__))
    where = f" ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    kind = type(error).__name__
    message = f": {str(error)[:2000]}" if _has_text(error) else ""
    return UserCodeError(f"raised {kind}{message}{where}", details=text_of(error), fault=f"raised {kind}{where}")


def _has_text(error: BaseException) -> bool:
    try:
        return bool(str(error))
    except Exception:
        return False


def text_of(error: BaseException) -> str:
    """The traceback from the user's own code on, of what is very long the end."""
    return "".join(traceback.format_exception(type(error), error, _own(error.__traceback__)))[-TRACEBACK_CHARS:]


def _own(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return trace


# Its result


def outcomes(result: Any, form: Form, count: int) -> list[Outcome]:
    """An Outcome for each of `count` answers, from what the function returned."""
    if not form.takes_list:
        return [outcome(result)]
    listed = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(listed, (list, tuple)):
        raise UserCodeError(f"takes a list of answers, and returned {_kind(result)} where a list of scores is needed")
    if len(listed) != count:
        raise UserCodeError(
            f"returned {len(listed)} scores for {count} answers; return one for each, in the same order",
            fault="returned another number of scores than there were answers",
        )
    return [outcome(item) for item in listed]


def outcome(result: Any) -> Outcome:
    """The Outcome of one answer: a number, or a dict with the number under "score" and further figures."""
    try:
        if not isinstance(result, dict):
            return score(result), {}
        if "score" not in result:
            raise UserCodeError(f'returned a dict without "score" (its keys: {_keys(result)})')
        return score(result["score"]), dict(_figures(result))
    except UserCodeError as error:
        return error


def score(value: Any) -> float:
    """A raw score: a finite number. Text and true/false are none, whatever Python's float() makes of them."""
    found = number(value)
    if found is None:
        raise UserCodeError(f"returned {_kind(value)} where a number is needed", fault=f"returned {type(value)}")
    if not math.isfinite(found):
        raise UserCodeError(f"returned {found}")
    if abs(found) > LARGEST:
        raise UserCodeError(f"returned {found:g}, which float32 cannot hold", fault="returned what float32 cannot hold")
    return found


def number(value: Any) -> float | None:
    """A number, a numpy scalar, or an array or tensor of one element as a float; None if it is none of these."""
    if callable(getattr(value, "item", None)):
        try:
            value = value.item()
        except Exception:  # several elements, or another object's method of that name
            return None
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, decimal.Decimal)):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _figures(result: dict[Any, Any]) -> Iterator[tuple[str, float]]:
    """A result's further figures. True and False count as 1 and 0; None and what is not finite is left out."""
    if len(result) > FIGURES + 1:
        raise UserCodeError(f"returned a dict of {len(result)} keys; at most {FIGURES} figures may stand beside score")
    for key, value in result.items():
        if key == "score" or value is None:
            continue
        if not isinstance(key, str) or not _NAME.fullmatch(key):
            raise UserCodeError(
                f"returned a dict with the key {str(key)[:80]!r}; a figure's name has letters, digits, _ and - only"
            )
        found = float(value) if isinstance(value, bool) else number(value)
        if found is None:
            raise UserCodeError(f"returned {_kind(value)} for {key!r} where a number is needed")
        if math.isfinite(found):
            yield key, found


def _keys(result: dict[Any, Any]) -> str:
    return ", ".join(repr(key)[:40] for key in list(result)[:10]) or "none"


def _kind(value: Any) -> str:
    if value is None:
        return "None"
    if inspect.iscoroutine(value):
        value.close()
        return "a coroutine (declare the function itself with async def)"
    text = repr(value) if isinstance(value, (str, bytes, bool, int)) else ""
    return f"{text[:80]} ({type(value).__name__})" if text else f"a {type(value).__name__}"
