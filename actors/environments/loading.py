"""Finds the class of an environment, or the function of an agent. Runs in each environment replica, and in a process of
its own for the check before a run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from common.user_code.calls import find_function
from common.user_code.errors import UserCodeError


def find_environment(path: str) -> Callable[[], Any]:
    """The class that `module:Class` names, or a function that makes instances. Raises UserCodeError."""
    make = find_function(path)
    _check_call(make, "must be made without arguments", ())
    if inspect.isclass(make):
        step = getattr(make, "step", None)
        if not callable(step):
            raise UserCodeError("has no method step; write async def step(self, message) -> Step")
        if inspect.isabstract(make):
            missing = ", ".join(sorted(getattr(make, "__abstractmethods__", ())))
            raise UserCodeError(f"is abstract: it lacks {missing}")
        _check_call(step, "must have a method step that takes a message", (None, None))
        if callable(reset := getattr(make, "reset", None)):
            _check_call(reset, "must have a method reset that takes a prompt, or none", (None, None))
    return make


def find_agent(path: str) -> Callable[..., Any]:
    """The agent that `module:function` names. Raises UserCodeError."""
    agent = find_function(path)
    if inspect.isclass(agent):
        raise UserCodeError("is a class; name a function, or an instance of the class that its module makes")
    if inspect.isgeneratorfunction(agent) or inspect.isasyncgenfunction(agent):
        raise UserCodeError("is a generator function (it has a yield); return the score instead")
    _check_call(agent, "must take a prompt and an endpoint, as in async def agent(prompt, endpoint)", (None, None))
    return agent


def _check_call(function: Callable[..., Any], rule: str, args: tuple[Any, ...]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # functions of extension modules may have no signature
        return
    try:
        signature.bind(*args)
    except TypeError as error:
        raise UserCodeError(f"{rule}; it takes {signature} ({error})") from None
