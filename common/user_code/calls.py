"""Finds a user's reward function, reads its signature and calls it. Runs anywhere. Imports only the standard library.

Every failure is a UserCodeError.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import io
import re
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib import import_module
from typing import Any, get_origin

from .errors import UserCodeError, error_of, error_text, traceback_text
from .results import Outcome, read_result, read_results

_LISTS = re.compile(r"(\w+\.)*(list|List|Sequence|Collection|Iterable)\b")


@dataclass(frozen=True)
class CallStyle:
    """The way a function is called."""

    is_async: bool = False
    takes_list: bool = False


# Finding it


def find_function(path: str) -> Callable[..., Any]:
    """The function that `module:function` names. Raises UserCodeError."""
    module_name, _, name = path.partition(":")
    if not module_name or ":" not in path:
        raise UserCodeError("must read module:function, such as deploy.tasks.larger:correct")
    printed = io.StringIO()  # argparse prints why it exits
    try:
        with redirect_stderr(printed):
            module = import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        missing = (error.name or module_name) if isinstance(error, ImportError) else ""
        reason = f"module {module_name} cannot be imported ({_why_not_imported(error, printed.getvalue())})"
        raise UserCodeError(reason, details=traceback_text(error), missing=missing) from error
    function = getattr(module, name, None)
    if not callable(function):
        file = getattr(module, "__file__", None) or "built in"
        raise UserCodeError(f"module {module_name} ({file}) has no function {name}")
    return function


def _why_not_imported(error: BaseException, printed: str) -> str:
    if not isinstance(error, SystemExit):
        return error_text(error)
    last = printed.strip().splitlines()[-1:] or [f"exit code {error.code}"]
    return (
        f"it ends the program while it is imported: {last[0]}; move script code, such as sys.exit() or reading the "
        'command line, under `if __name__ == "__main__":`'
    )


# Its signature


def call_style(function: Callable[..., Any], takes: str = "annotated") -> CallStyle:
    """How to call the function. `takes`: answer, list, or annotated: the annotation of the parameter decides.
    Raises UserCodeError if the function cannot be called with a RewardInput."""
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
    except (TypeError, ValueError):  # functions of extension modules may have no signature
        return CallStyle(is_async, takes == "list")
    parameters = list(signature.parameters.values())
    is_trl = not {"prompts", "completions"}.isdisjoint(signature.parameters)
    try:
        signature.bind(None)
    except TypeError as error:
        raise UserCodeError(_does_not_fit(signature, f" ({error})", is_trl=is_trl)) from None
    if parameters[0].name in ("prompts", "completions"):
        raise UserCodeError(_does_not_fit(signature, "", is_trl=True))
    is_list = takes == "annotated" and _is_list(parameters[0].annotation)
    return CallStyle(is_async, takes == "list" or is_list)


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(function, eval_str=True)
    except Exception:  # an annotation may name something that only a type checker imports
        return inspect.signature(function)


def _does_not_fit(signature: inspect.Signature, why: str, *, is_trl: bool) -> str:
    hint = " (functions for TRL take lists of texts: write one that takes list[RewardInput])" if is_trl else ""
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


def call(function: Callable[..., Any], style: CallStyle, answers: Sequence[Any]) -> list[Outcome]:
    """The outcome of each answer. Raises UserCodeError when the call as a whole fails."""
    try:
        returned = function(list(answers) if style.takes_list else answers[0])
    except BaseException as error:
        raise error_of(error) from error
    return read_results(returned, len(answers)) if style.takes_list else [read_result(returned)]


async def call_async(
    function: Callable[..., Awaitable[Any]], style: CallStyle, answers: Sequence[Any]
) -> list[Outcome]:
    """Like `call`, for an async function. Raises CancelledError if the caller cancels it."""
    task = asyncio.current_task()
    try:
        returned = await function(list(answers) if style.takes_list else answers[0])
    except BaseException as error:
        if is_cancelled_from_outside(error, task):
            raise
        raise error_of(error) from error
    return read_results(returned, len(answers)) if style.takes_list else [read_result(returned)]


def is_cancelled_from_outside(error: BaseException, task: asyncio.Task[Any] | None) -> bool:
    """True if the caller cancelled the call, or dropped it before its end. False if the function itself raised the
    error."""
    if isinstance(error, asyncio.CancelledError):
        return task is not None and task.cancelling() > 0
    if isinstance(error, GeneratorExit):
        try:
            return asyncio.current_task() is not task
        except RuntimeError:  # the event loop has ended
            return True
    return False
