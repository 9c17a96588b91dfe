"""Episodes in which the model calls Python functions: answers, errors, order, and calls side by side."""

import asyncio
import functools
import json
import sys
import threading
import types
from typing import Any

import pytest

from actors.environments.steps import read_step
from actors.environments.tools import ParsedTurn, ToolCall, ToolEnvironment
from common.environment import EpisodePrompt, Step
from common.user_code.tools import Tool, load_tools

WAIT_S = 10


def add(a: int, b: int = 1) -> int:
    """Adds two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


def divide(a: float, b: float) -> float:
    """Divides two numbers.

    Args:
        a: The dividend.
        b: The divisor.
    """
    return a / b


async def greet(name: str) -> str:
    """Greets.

    Args:
        name: Who is greeted.
    """
    await asyncio.sleep(0)
    if not name:
        raise LookupError
    return f"Grüezi {name}"


def find(text: str) -> dict:
    """Finds a text.

    Args:
        text: The text.
    """
    return {"found": [text, None, 0.5], "ö": True}


def leave() -> None:
    """Ends the program."""
    sys.exit(3)


async def leave_later() -> None:
    """Ends the program, later."""
    sys.exit("bye")


def stop_iteration() -> None:
    """Raises what a future cannot hold."""
    raise StopIteration


def interrupt() -> None:
    """Raises what ends a thread."""
    raise KeyboardInterrupt


async def cancel() -> None:
    """Raises what ends a task, although nobody cancelled the call."""
    raise asyncio.CancelledError


async def leave_generator() -> None:
    """Raises what ends a coroutine."""
    raise GeneratorExit


class NoTextError(Exception):
    def __str__(self):
        raise RuntimeError


def no_text() -> None:
    """Raises an error without a text."""
    raise NoTextError


def half_a_pair(form: str) -> Any:
    """Returns text with halves of surrogate pairs.

    Args:
        form: Text, list or error.
    """
    if form == "error":
        raise ValueError("\ud83d")
    return ["a\ud83d", "\ud83d\ude00"] if form == "list" else "\ude00a"


@functools.wraps(greet)
def logged(*args, **kwargs):
    """A wrapper that is no async function, but returns what one does."""
    return greet(*args, **kwargs)


@pytest.fixture
def environment(monkeypatch):
    """Makes an environment of these functions. The model writes its calls as a JSON list of [name, arguments]."""
    module = types.ModuleType("users_tools")
    monkeypatch.setitem(sys.modules, "users_tools", module)

    def make(*functions):
        for function in functions:
            setattr(module, function.__name__, function)
        return ToolEnvironment(load_tools([f"users_tools:{f.__name__}" for f in functions]), parse)

    return make


def parse(text):
    if text == "broken":
        return ParsedTurn(error="JSONDecodeError: Expecting value:\n line 1")
    calls = json.loads(text) if text.startswith("[") else []
    return ParsedTurn([ToolCall(name, a if isinstance(a, str) else json.dumps(a)) for name, a in calls])


def turn(environment, *calls, text=""):
    """The step that answers one turn of the model."""
    message = {"role": "assistant", "content": text or json.dumps(calls)}
    return asyncio.run(asyncio.wait_for(environment.step(message), WAIT_S))


def contents(step):
    return [message["content"] for message in step.observation]


def test_a_turn_without_a_call_ends_the_episode(environment):
    game = environment(add)
    assert asyncio.run(game.reset(EpisodePrompt("2 + 2", None))) is None
    step = turn(game, text="The answer is 4.")
    assert step == Step(None, 0.0, True, False, {"tool_calls": 0, "failed_calls": 0})
    assert asyncio.run(game.close()) is None


def test_results_are_messages_of_the_role_tool_in_the_order_of_the_calls(environment):
    game = environment(add, greet)
    step = turn(game, ("greet", {"name": "Eva"}), ("add", {"a": 20, "b": 22}), ("add", {"a": 1}))
    assert step == Step(
        [
            {"role": "tool", "name": "greet", "tool_call_id": "call00000", "content": "Grüezi Eva"},
            {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "42"},
            {"role": "tool", "name": "add", "tool_call_id": "call00002", "content": "2"},
        ],
        0.0,
        False,
        False,
        {"tool_calls": 3, "failed_calls": 0},
    )
    assert turn(game, ("add", {"a": 1})).observation[0]["tool_call_id"] == "call01000"


def test_results_that_are_not_text_are_json(environment):
    assert contents(turn(environment(find), ("find", {"text": "x"}))) == ['{"found": ["x", null, 0.5], "ö": true}']


@pytest.mark.parametrize(
    ("call", "content"),
    [
        (("sub", {"a": 1}), "Error: there is no tool 'sub'; the tools are add, divide, greet"),
        (
            ("add", '{"a": 1'),
            "Error: wrong call of add: the arguments are not valid JSON (Expecting ',' delimiter: line",
        ),
        (("add", "[1, 2]"), "Error: wrong call of add: the arguments must be a JSON object, not list"),
        (("add", ""), "Error: wrong call of add: the argument a is missing"),
        (("add", {"a": 1, "c": 2}), "Error: wrong call of add: there is no argument c"),
        (("add", {"a": "one"}), "Error: wrong call of add: a: Input should be a valid integer"),
        (("divide", {"a": 1, "b": 0}), "Error: ZeroDivisionError: float division by zero"),
        (("greet", {"name": ""}), "Error: LookupError"),
        (("add", "[" * 100_000), "Error: wrong call of add: the arguments are not valid JSON (maximum recursion depth"),
    ],
)
def test_a_wrong_call_is_answered_with_its_error(environment, call, content):
    step = turn(environment(add, divide, greet), call, ("add", {"a": 1}))
    first, second = contents(step)
    assert first.startswith(content)
    assert second == "2"
    assert (step.terminated, step.info) == (False, {"tool_calls": 2, "failed_calls": 1})


def test_a_call_that_the_parser_cannot_read_is_a_failed_call(environment):
    step = turn(environment(add), text="broken")
    assert contents(step) == ["Error: the call could not be read: JSONDecodeError: Expecting value: line 1"]
    assert (step.terminated, step.info) == (False, {"tool_calls": 1, "failed_calls": 1})


@pytest.mark.parametrize(
    ("function", "content"),
    [
        (leave, "Error: SystemExit: 3"),
        (leave_later, "Error: SystemExit: bye"),
        (stop_iteration, "Error: StopIteration"),
        (interrupt, "Error: KeyboardInterrupt"),
        (cancel, "Error: CancelledError"),
        (leave_generator, "Error: GeneratorExit"),
        (no_text, "Error: NoTextError"),
    ],
)
def test_a_tool_that_ends_the_program_is_answered_with_its_error(environment, function, content):
    step = turn(environment(function), (function.__name__, {}))
    assert (contents(step), step.info["failed_calls"]) == ([content], 1)


def test_an_async_tool_that_raises_before_it_returns_a_coroutine_is_answered():
    def fails():  # as a function with inspect.markcoroutinefunction may
        raise LookupError("no service")

    tool = Tool("fails", fails, {}, True, lambda: ((), {}))
    step = turn(ToolEnvironment([tool], parse), ("fails", {}))
    assert (contents(step), step.info["failed_calls"]) == (["Error: LookupError: no service"], 1)


def test_the_result_of_a_wrapped_async_function_is_awaited(environment):
    step = turn(environment(logged), ("greet", {"name": "Eva"}), ("greet", {"name": ""}))
    assert contents(step) == ["Grüezi Eva", "Error: LookupError"]
    assert step.info == {"tool_calls": 2, "failed_calls": 1}


def test_an_episode_that_ends_cancels_its_async_calls(environment):
    ended = []

    async def wait() -> None:
        """Waits."""
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append(True)

    async def cancelled():
        step = asyncio.ensure_future(environment(wait).step({"content": '[["wait", {}]]'}))
        await asyncio.sleep(0.01)
        step.cancel()
        await asyncio.wait([step])
        return step.cancelled()

    assert asyncio.run(asyncio.wait_for(cancelled(), WAIT_S))
    assert ended == [True]


@pytest.mark.parametrize(
    ("form", "content"),
    [("text", "\ufffda"), ("list", '["a\ufffd", "\U0001f600"]'), ("error", "Error: ValueError: \\ud83d")],
)
def test_halves_of_surrogate_pairs_in_a_result_are_replaced(environment, form, content):
    """No message may have them, so they would void the episode."""
    step = read_step(turn(environment(half_a_pair), ("half_a_pair", {"form": form})), chat=True)
    assert step.messages[0]["content"] == content


def test_a_call_of_the_model_has_no_halves_of_surrogate_pairs():
    """A parser makes them from JSON escapes. The name of the call is in the answer's message."""
    call = ToolCall("\ud83d", '{"a": "\ud83d\ude00"}')
    assert (call.name, call.arguments) == ("\ufffd", '{"a": "\U0001f600"}')
    game = ToolEnvironment([], lambda text: ParsedTurn([call]))
    step = read_step(turn(game, text="x"), chat=True)
    assert step.messages[0]["name"] == "\ufffd"
    assert step.messages[0]["content"].startswith("Error: there is no tool '\ufffd'")


def test_the_calls_of_a_turn_run_side_by_side(environment):
    """Each of the five waits for all the others. One after the other, they would fail."""
    barrier = threading.Barrier(5)

    def meet(number: int) -> int:
        """Waits for four others.

        Args:
            number: Is returned.
        """
        barrier.wait(WAIT_S)
        return number

    async def meet_async(number: int) -> int:
        """Waits for four others.

        Args:
            number: Is returned.
        """
        await asyncio.to_thread(barrier.wait, WAIT_S)
        return number

    calls = [("meet", {"number": 0}), ("meet_async", {"number": 1}), ("meet", {"number": 2})]
    calls += [("meet_async", {"number": 3}), ("meet", {"number": 4})]
    step = turn(environment(meet, meet_async), *calls)
    assert contents(step) == ["0", "1", "2", "3", "4"]


def test_an_episode_continues_in_another_process(environment):
    first, second = environment(add), environment(add)
    turn(first, ("add", {"a": 1}))
    second.restore(first.state())
    assert turn(second, ("add", {"a": 1})).observation[0]["tool_call_id"] == "call01000"
