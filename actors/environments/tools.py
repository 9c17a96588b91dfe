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
from dataclasses import dataclass
from typing import Any

from actors.environments.instance import CallsInThreads
from common.daemon_threads import in_daemon_thread
from common.environment import EpisodePrompt, Step
from common.plain_text import one_line, without_surrogates
from common.user_code.calls import is_cancelled_from_outside
from common.user_code.errors import error_text
from common.user_code.tools import Tool, WrongArgumentsError


@dataclass(frozen=True)
class ToolCall:
    """A call as the model wrote it. The model can write halves of surrogate pairs, as JSON escapes: they are replaced,
    because no message may have them."""

    name: str
    arguments: str  # JSON, which may be invalid

    def __post_init__(self) -> None:
        for key in ("name", "arguments"):
            object.__setattr__(self, key, without_surrogates(getattr(self, key)))


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


class ToolEnvironment(CallsInThreads):
    """One episode. It ends with the first turn that has no call. Turns have no reward: the reward sources score the
    episode."""

    needs_special_tokens = True  # `step` must get them, because some models mark their calls with special tokens

    def __init__(self, tools: Sequence[Tool], parse: Callable[[str], ParsedTurn]) -> None:
        """`parse` finds the calls in what the model wrote."""
        super().__init__()
        self._tools = {tool.name: tool for tool in tools}
        self._parse = parse
        self._turn = 0

    async def reset(self, prompt: EpisodePrompt) -> None:
        """Changes nothing: the chat template wrote the tools into the prompt."""

    async def step(self, message: Mapping[str, Any]) -> Step:
        """Runs the calls of a turn. The step's `info` has the numbers of calls and of failed calls."""
        self.calls_in_threads.clear()
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
            return await _awaited(lambda: tool.function(*args, **kwargs))
        # A thread of its own for each call: one that never returns must not take the place of another.
        self.calls_in_threads.append(running := in_daemon_thread(_call, tool, args, kwargs))
        answered = await asyncio.wrap_future(running)
        return answered if isinstance(answered, Answer) else await _awaited(lambda: answered)


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


async def _awaited(function: Callable[[], Awaitable[Any]]) -> Answer:
    """Awaits what the function returns. Raises CancelledError if the episode ends."""
    task = asyncio.current_task()
    try:
        return Answer(_text(await function()))
    except BaseException as error:
        if is_cancelled_from_outside(error, task):
            raise
        return _failure(error)


def _failure(error: BaseException) -> Answer:
    return Answer(f"Error: {one_line(error_text(error))}", failed=True)


def _text(result: Any) -> str:
    """A result as the model reads it: text as it is, else JSON. What JSON does not have is written with str()."""
    text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
    return without_surrogates(text)
