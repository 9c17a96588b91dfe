"""Descriptions of tools, made from signature and docstring, and the check of a call's arguments."""

import sys
import types
from typing import Literal

import pytest

from common.errors import UserError
from common.user_code.tools import WrongArgumentsError, load_tools


def weather(city: str, days: int = 1, unit: Literal["C", "F"] = "C") -> str:
    """The weather forecast of a city.

    Args:
        city: Name of the city.
        days: Number of days from today.
        unit: Of the temperature.
    """
    return f"{city} {days} {unit}"


async def lookup(word: str, tags: list[str] | None = None) -> dict:
    """Looks a word up.

    Args:
        word: The word.
        tags: Only meanings with these tags.
    """
    return {word: tags}


class Desk:
    def note(self, text: str) -> None:
        """Writes a note.

        Args:
            text: The note.
        """


@pytest.fixture
def module(monkeypatch):
    """A module of the user; its functions are set as attributes."""
    module = types.ModuleType("users_tools")
    monkeypatch.setitem(sys.modules, "users_tools", module)
    return module


def load(module, *functions):
    for i, function in enumerate(functions):
        setattr(module, f"f{i}", function)
    return load_tools([f"users_tools:f{i}" for i in range(len(functions))])


def test_a_schema_has_the_description_the_types_and_what_is_required(module):
    (tool,) = load(module, weather)
    assert (tool.name, tool.is_async) == ("weather", False)
    assert tool.schema == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather forecast of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Name of the city."},
                    "days": {"type": "integer", "description": "Number of days from today."},
                    "unit": {"type": "string", "enum": ["C", "F"], "description": "Of the temperature."},
                },
                "required": ["city"],
            },
            "return": {"type": "string"},
        },
    }


def test_async_functions_and_bound_methods_are_tools(module):
    tools = load(module, lookup, Desk().note)
    assert [(tool.name, tool.is_async) for tool in tools] == [("lookup", True), ("note", False)]
    assert list(tools[1].schema["function"]["parameters"]["properties"]) == ["text"]


def test_arguments_are_converted_to_the_types_of_the_hints(module):
    (tool,) = load(module, weather)
    args, kwargs = tool.arguments({"city": "Bern", "days": "3"})
    assert tool.function(*args, **kwargs) == "Bern 3 C"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "the argument city is missing"),
        ({"city": "Bern", "town": "x"}, "there is no argument town"),
        (
            {"city": "Bern", "days": "soon"},
            "days: Input should be a valid integer, unable to parse string as an integer",
        ),
        ({"city": 7}, "city: Input should be a valid string"),
        ({"city": "Bern", "unit": "K"}, "unit: Input should be 'C' or 'F'"),
        (
            {"days": [], "x": 1},
            "the argument city is missing; days: Input should be a valid integer; there is no argument x",
        ),
    ],
)
def test_wrong_arguments_are_explained(module, given, message):
    (tool,) = load(module, weather)
    with pytest.raises(WrongArgumentsError) as error:
        tool.arguments(given)
    assert str(error.value) == message


def no_docstring(city: str):
    return city


def only_arguments(city: str):
    """
    Args:
        city: Name of the city.
    """


def no_line_for_it(city: str, days: int):
    """Weather.

    Args:
        city: Name of the city.
    """


def no_type(city):
    """Weather.

    Args:
        city: Name of the city.
    """


def any_number(*cities: str):
    """Weather.

    Args:
        cities: Names of the cities.
    """


def own_class(desk: Desk):
    """Weather.

    Args:
        desk: A desk.
    """


def yields(city: str):
    """Weather.

    Args:
        city: Name of the city.
    """
    yield city


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            no_docstring,
            "cannot be described to the model: Cannot generate JSON schema for no_docstring because it has no",
        ),
        (
            only_arguments,
            "docstring has no description for the argument 'city'; give every parameter a type that JSON has",
        ),
        (
            no_line_for_it,
            "because the docstring has no description for the argument 'days'; give every parameter a type",
        ),
        (no_type, "Argument city is missing a type hint in function no_type; give every parameter a type"),
        (any_number, "so the parameter cities cannot be *args, **kwargs or positional-only; give it a name of its own"),
        (own_class, "(users_tools:f0): its arguments cannot be checked: Unable to generate pydantic-core schema for"),
        (yields, "is a generator function (it has a yield); return the result instead"),
        (Desk, "is not a Python function; write a function that calls it"),
        (len, "is not a Python function; write a function that calls it"),
    ],
)
def test_a_function_that_cannot_be_described_is_refused(module, function, message):
    with pytest.raises(UserError) as error:
        load(module, function)
    assert str(error.value).startswith("environment.tools (users_tools:f0)")
    assert message in str(error.value)


def test_two_tools_of_one_name_are_refused(module):
    with pytest.raises(UserError, match="two tools have the name weather; rename one"):
        load(module, weather, weather)


def test_a_function_that_does_not_exist_is_refused(module):
    with pytest.raises(
        UserError, match=r"environment.tools \(users_tools:none\): module users_tools .* has no function"
    ):
        load_tools(["users_tools:none"])
