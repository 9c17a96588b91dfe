"""An environment in which the model calls tools, which are plain Python functions. Runs in each environment replica.

    model:        <tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>
    environment:  {"role": "tool", "name": "weather", "tool_call_id": "call00000", "content": "sunny"}
    model:        Sunny.        (no call: the episode ends)

The calls of a turn run at the same time. A wrong call is answered with its error, so that the model can learn from it.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from common.daemon_threads import in_daemon_thread
from common.environment import EpisodePrompt, Step
from common.plain_text import one_line, without_surrogates
from common.user_code.calls import is_cancelled_from_outside
from common.user_code.tools import Tool, WrongArgumentsError


@dataclass(frozen=True)
class ToolCall:
    """A call as the model wrote it. Both are text without halves of surrogate pairs, which the model can write as JSON
    escapes."""

    name: str
    arguments: str  # JSON, which may be invalid

    @classmethod
    def of(cls, name: str, arguments: str) -> ToolCall:
        """A call that a parser found."""
        return cls(without_surrogates(name), without_surrogates(arguments))


@dataclass(frozen=True)
class ParsedTurn:
    """The calls in a turn of the model, in order. If one cannot be read, there are none, and `error` says why."""

    calls: Sequence[ToolCall] = ()
    error: str = ""
    content: str = ""  # the text next to the calls, if there are any


@dataclass(frozen=True)
class Answer:
    """The answer to a call."""

    text: str
    failed: bool = False


class ToolEnvironment:
    """One episode. It ends with the first turn that has no call. Turns have no reward: the reward sources score the
    episode."""

    needs_special_tokens = True  # `step` must get them, because some models mark their calls with special tokens

    def __init__(self, tools: Sequence[Tool], parse: Callable[[str], ParsedTurn]) -> None:
        """`parse` finds the calls in what the model wrote."""
        self._tools = {tool.name: tool for tool in tools}
        self._parse = parse
        self._turn = 0
        self._in_threads: list[Future[Answer | Awaitable[Any]]] = []  # the calls of plain functions in the newest turn

    async def reset(self, prompt: EpisodePrompt) -> None:
        """Changes nothing: the chat template wrote the tools into the prompt."""

    async def step(self, message: Mapping[str, Any]) -> Step:
        """Runs the calls of a turn. The step's `info` has the numbers of calls and of failed calls."""
        self._in_threads.clear()
        turn = self._parse(message["content"])
        if turn.error:
            answers, names = [Answer(f"Error: the call could not be read: {one_line(turn.error)}", failed=True)], [""]
        else:
            answers = await asyncio.gather(*(self._answer(call) for call in turn.calls))
            names = [call.name for call in turn.calls]
        messages = [
            # Some templates print the id, so it must not be random. Mistral's want 9 letters or digits.
            {"role": "tool", "name": name, "tool_call_id": f"call{self._turn:02d}{i:03d}", "content": answer.text}
            for i, (name, answer) in enumerate(zip(names, answers))
        ]
        self._turn += 1
        info = {"tool_calls": len(answers), "failed_calls": sum(answer.failed for answer in answers)}
        return Step(messages or None, terminated=not messages, info=info)

    async def close(self) -> None:
        """Nothing to free: a plain function that still runs is left to its thread."""

    @property
    def still_runs(self) -> bool:
        """True if a plain function has not returned."""
        return not all(call.done() for call in self._in_threads)

    def state(self) -> int:
        """The number of turns so far: all that an episode continues from."""
        return self._turn

    def restore(self, state: int) -> None:
        """Continues an episode of another process."""
        self._turn = state

    async def _answer(self, call: ToolCall) -> Answer:
        tool = self._tools.get(call.name)
        if tool is None:
            known = ", ".join(self._tools)
            return Answer(f"Error: there is no tool {one_line(call.name)!r}; the tools are {known}", failed=True)
        try:
            args, kwargs = tool.arguments(_json_object(call.arguments))
        except WrongArgumentsError as error:
            return Answer(f"Error: wrong call of {tool.name}: {one_line(str(error))}", failed=True)
        if tool.is_async:
            return await _awaited(tool.function(*args, **kwargs))
        # A thread of its own for each call: one that never returns must not take the place of another.
        self._in_threads.append(running := in_daemon_thread(_call, tool, args, kwargs))
        answered = await asyncio.wrap_future(running)
        return answered if isinstance(answered, Answer) else await _awaited(answered)


def _json_object(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text or "{}")  # some parsers give "" for a call without arguments
    except (ValueError, RecursionError) as error:
        raise WrongArgumentsError(f"the arguments are not valid JSON ({error})") from None
    if not isinstance(arguments, dict):
        raise WrongArgumentsError(f"the arguments must be a JSON object, not {type(arguments).__name__}")
    return arguments


def _call(tool: Tool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Answer | Awaitable[Any]:
    """Calls a plain function, which may return an awaitable, as the wrapper of an async function does. Never raises, so
    that no failure of a tool can end its thread or the event loop."""
    try:
        result = tool.function(*args, **kwargs)
        return result if inspect.isawaitable(result) else Answer(_text(result))
    except BaseException as error:
        return _failure(error)


async def _awaited(result: Awaitable[Any]) -> Answer:
    """Raises CancelledError if the episode ends."""
    task = asyncio.current_task()
    try:
        return Answer(_text(await result))
    except BaseException as error:
        if is_cancelled_from_outside(error, task):
            raise
        return _failure(error)


def _failure(error: BaseException) -> Answer:
    try:
        text = one_line(f"{type(error).__name__}: {error}")
    except Exception:  # its text cannot be made
        text = type(error).__name__
    return Answer(f"Error: {text.removesuffix(':')}", failed=True)


def _text(result: Any) -> str:
    """A result as the model reads it: text as it is, else JSON. What JSON does not have is written with str()."""
    text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
    return without_surrogates(text)
