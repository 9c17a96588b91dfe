"""Tools: plain Python functions that the model may call, with the description that its chat template shows it. Runs in
the driver, and in each environment replica.

A tool has type hints and a docstring in Google's format:

    def weather(city: str, days: int = 1) -> str:
        '''The weather forecast of a city.

        Args:
            city: Name of the city.
            days: Number of days from today.
        '''
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError, validate_call
from pydantic.errors import PydanticUserError

from common.errors import UserError
from common.user_code.functions import load_function

_REMEDY = (
    "give every parameter a type that JSON has and a line in the docstring's `Args:`, after a sentence that says what "
    "the function does (docs/environments.md has an example)"
)


class WrongArgumentsError(Exception):
    """The arguments of a call do not fit the function. The message says why, for the model that wrote the call."""


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    name: str
    function: Callable[..., Any]
    schema: Mapping[str, Any]  # {"type": "function", "function": {...}}, as chat templates take it
    is_async: bool
    _check: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]

    def arguments(self, given: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and keyword arguments of a call, converted to the types of the hints ("12" to 12 for an int).
        Raises WrongArgumentsError for a missing or unknown argument and for a value that does not convert."""
        try:
            return self._check(**given)
        except ValidationError as error:
            raise WrongArgumentsError("; ".join(_fault(fault) for fault in error.errors())) from None


def load_tools(paths: Sequence[str], setting: str = "environment.tools") -> tuple[Tool, ...]:
    """The tools that `module:function` paths name. Raises UserError for one that cannot be described to the model."""
    tools: dict[str, Tool] = {}
    for path in paths:
        tool = _tool(path, setting)
        if tool.name in tools:
            raise UserError(f"{setting}: two tools have the name {tool.name}; rename one of the functions")
        tools[tool.name] = tool
    return tuple(tools.values())


def _tool(path: str, setting: str) -> Tool:
    function = load_function(path, setting)
    where = f"{setting} ({path})"
    if not inspect.isroutine(function) or inspect.isbuiltin(function):
        raise UserError(f"{where} is not a Python function; write a function that calls it")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise UserError(f"{where} is a generator function (it has a yield); return the result instead")
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UserError(
                f"{where}: a call names every argument, so the parameter {name} cannot be *args, **kwargs or "
                "positional-only; give it a name of its own"
            )
    schema = _schema(function, where)
    return Tool(
        schema["function"]["name"], function, schema, inspect.iscoroutinefunction(function), _checker(function, where)
    )


def _schema(function: Callable[..., Any], where: str) -> dict[str, Any]:
    # Importing it takes a second, which runs without tools need not wait for.
    from transformers.utils import get_json_schema

    try:
        return get_json_schema(function)
    except Exception as error:  # hints are evaluated and may raise anything
        reason = " ".join(map(str, error.args))
        raise UserError(f"{where} cannot be described to the model: {reason}; {_REMEDY}") from error


def _checker(function: Callable[..., Any], where: str) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    """Takes the function's arguments and returns them, converted to the types of its hints."""

    @functools.wraps(function)  # pydantic reads the signature and the hints
    def take(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs

    try:
        return validate_call(take)
    except PydanticUserError as error:
        raise UserError(
            f"{where}: its arguments cannot be checked: {error.message.splitlines()[0]}; {_REMEDY}"
        ) from error


def _fault(fault: Mapping[str, Any]) -> str:
    """One fault that pydantic found. pydantic's words for a missing or an unknown argument would confuse a model."""
    place = ".".join(map(str, fault["loc"]))
    if fault["type"] in ("missing_argument", "missing_keyword_only_argument"):
        return f"the argument {place} is missing"
    if fault["type"] == "unexpected_keyword_argument":
        return f"there is no argument {place}"
    return f"{place}: {fault['msg']}"
