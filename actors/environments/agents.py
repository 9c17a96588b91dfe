"""An environment that is an agent: a function that asks the model as often as it wants, and returns a score. Runs in
each environment replica.

    driver                      this object                  the agent
    reset(prompt)         ->    starts the agent        ->   POST /v1/chat/completions
    a prompt              <-    its first request       <-
    step(answer)          ->    the HTTP answer         ->   uses it, and asks again
    an observation        <-    its next request        <-
    step(answer)          ->    the HTTP answer         ->   returns 0.5
    Step(terminated=True) <-    its score               <-

Requests go to the model one after another, in the order in which they come. A request that continues the conversation
of the newest answer adds its new messages. Any other request begins a new context, which the learner reads as a
separate sequence. If it continues an earlier conversation of the episode, that conversation's tokens are used again.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from actors.environments.chat_answers import ChatAnswer
from actors.environments.chat_requests import ChatRequest, RefusedError, canonical_message
from actors.environments.conversations import Answered, Conversations, new_messages
from actors.environments.endpoint import EndpointServer
from actors.environments.instance import CallsInThreads, CompleteError
from actors.environments.steps import Continuation, LimitError, PolicyTurn, Restart, read_info
from actors.environments.tool_formats import CallReader, ToolFormats
from common.config.environment import EnvironmentConfig
from common.daemon_threads import in_daemon_thread
from common.environment import EpisodePrompt, Step
from common.errors import UserError
from common.plain_text import one_line
from common.user_code.errors import UserCodeError
from common.user_code.methods import call_awaited, call_plain
from common.user_code.results import FLOAT32_MAX, as_number, kind_of_value

RETURN = "return the score, a number, or a mapping with score and info"


@dataclass(frozen=True)
class _Asked:
    """A request that waits for its answer."""

    request: ChatRequest
    answer: Future[ChatAnswer]
    reader: CallReader | None = None  # of the calls in the answer, if the request has tools


class AgentEnvironment(CallsInThreads):
    """One episode. The user's event loop runs all methods except `ask`."""

    needs_turn = True  # `step` gets a PolicyTurn
    names: Mapping[str, str] = {  # what messages call each method: the user wrote an agent and knows no methods
        "reset": "the agent, until its first request,",
        "refuse_prompt": "the agent, until its next request,",
        "step": "the agent, until its next request,",
        "refuse_step": "the agent, after a request was refused,",
    }
    gave = "the agent sent"  # what messages say about messages that the model cannot get, in place of "step returned"

    def __init__(
        self, agent: Callable[..., Any], server: EndpointServer, formats: ToolFormats, cfg: EnvironmentConfig
    ) -> None:
        """`formats` reads the calls that the model writes, with the tools of each request."""
        super().__init__()
        self._agent, self._server, self._formats, self._cfg = agent, server, formats, cfg
        self._waiting: deque[_Asked] = deque()
        self._asked: _Asked | None = None  # the model writes its answer
        self._conversations = Conversations()
        self._num_answers = 0
        self._over: RefusedError | None = None  # the answer to all further requests

    async def reset(self, prompt: EpisodePrompt) -> Restart:
        """Starts the agent. Returns its first request, which replaces the prompt."""
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
        self._endpoint = self._server.open(self.ask)
        self._task = self._loop.create_task(self._run(prompt))
        self._task.add_done_callback(lambda _: self._news.set())
        return await self._first(
            "the agent returned without a request to the model, so the episode has nothing to learn from; ask "
            "endpoint.model at endpoint.base_url"
        )

    async def _first(self, otherwise: str) -> Restart:
        """The first request that can be answered. Raises CompleteError with the reason `otherwise` if none comes."""
        self._asked = await self._next()
        if self._asked is None:
            self._result()
            raise CompleteError(otherwise)
        request = self._asked.request
        return Restart(list(request.messages), ends=True, options=_options(request))

    async def refuse_prompt(self, error: LimitError) -> Restart:
        """Refuses the first request, because its messages are too long. Returns the next one."""
        found = f"the messages have {error.num_tokens} tokens, but prompts.max_tokens and the model's context allow"
        self._refuse_long(f"{found} {error.room}; send fewer or shorter messages")
        return await self._first(
            "the agent returned without a request that the model could answer, so the episode has nothing to learn "
            f"from; its last one was too long ({error.num_tokens} tokens, where prompts.max_tokens and the model's "
            f"context allow {error.room}): let it send shorter messages, or raise prompts.max_tokens"
        )

    async def step(self, turn: PolicyTurn) -> Step:
        """Answers the open request, and waits for the next one or for the end of the agent."""
        assert self._asked is not None
        asked, self._asked = self._asked, None
        answer = self._answer(asked, turn)
        self._num_answers += 1
        message = canonical_message(answer.message)
        self._conversations.add(Answered(asked.request, message, turn.context_ids))
        _settle(asked.answer, answer)
        self._asked = await self._next()
        return self._finish() if self._asked is None else Step(self._observation(self._asked.request))

    async def refuse_step(self, error: LimitError) -> Step:
        """Refuses the open request, because the episode has reached a limit. After max_turns all others are refused
        too. After max_tokens the agent may send a shorter one. It may always return a score."""
        setting = f"environment.{error.limit} ({getattr(self._cfg, error.limit)})"
        if error.limit == "max_turns":
            reached = f"the episode has reached {setting}; the model is not asked again"
            self._refuse(RefusedError(reached, code="max_turns"))
            await asyncio.wait([self._task])
        else:
            self._refuse_long(
                f"the request adds {error.num_tokens} tokens to the episode, which has room for {error.room} before "
                f"{setting}; send fewer or shorter messages, in another conversation"
            )
            self._asked = await self._next()
        if self._asked is not None:
            return Step(self._observation(self._asked.request))
        try:
            return self._finish()
        except CompleteError as failed:
            raise CompleteError(
                f"a request was refused, because the episode has reached {setting}, and {failed.reason}; let the agent "
                "return a score then, or raise the limit",
                details=failed.details,
                fault=f"the agent returned no score after environment.{error.limit}",
                permanent=False,
                kind=failed.kind,
            ) from failed

    async def close(self) -> None:
        """Cancels the agent, and refuses its open requests. A plain function cannot be cancelled: its next request is
        refused."""
        if not hasattr(self, "_task"):
            return
        self._server.shut(self._endpoint)
        if asyncio.get_running_loop() is not self._loop:  # a task blocks that loop
            self._loop.call_soon_threadsafe(self._task.cancel)
            return
        self._refuse(RefusedError("the episode is over", code="episode_over"))
        if not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])

    # Requests

    def ask(self, request: ChatRequest) -> Future[ChatAnswer]:
        """Takes a request. Called in the server's thread, and returns at once."""
        asked = _Asked(request, Future())
        self._loop.call_soon_threadsafe(self._arrived, asked)
        return asked.answer

    def _arrived(self, asked: _Asked) -> None:
        if self._over is not None:
            _refuse(asked.answer, self._over)
            return
        self._waiting.append(asked)
        self._news.set()

    async def _next(self) -> _Asked | None:
        """The next request that waits. None: the agent has ended, so none of its requests is answered any more."""
        while not self._task.done():
            if not self._waiting:
                self._news.clear()
                await self._news.wait()
                continue
            asked = self._waiting.popleft()
            if asked.answer.cancelled():  # its client went away
                continue
            try:
                reader = await self._formats.prepare(asked.request.tools)
            except UserError as error:
                _refuse(asked.answer, RefusedError(str(error), param="tools"))
                continue
            return replace(asked, reader=reader)
        return None

    def _refuse(self, error: RefusedError) -> None:
        """Refuses all open requests, and those to come."""
        self._over = error
        for asked in [*([self._asked] if self._asked else []), *self._waiting]:
            _refuse(asked.answer, error)
        self._asked = None
        self._waiting.clear()

    def _refuse_long(self, reason: str) -> None:
        """Refuses the open request as OpenAI refuses one whose messages are too long."""
        assert self._asked is not None
        reason = f"the maximum context length is exceeded: {reason}"
        _refuse(self._asked.answer, RefusedError(reason, code="context_length_exceeded", param="messages"))
        self._asked = None

    def _observation(self, request: ChatRequest) -> Any:
        """A Restart or a Continuation."""
        options = _options(request)
        before = self._conversations.continued_by(request)
        if self._cfg.sequence == "turn":  # each turn is a sequence, whose prompt the chat template writes again
            continues = before is not None and self._conversations.is_newest(before)
            return Restart(list(request.messages), ends=not continues, options=options)
        if before is None:
            return Restart(list(request.messages), ends=True, options=options)
        said = list(new_messages(before, request))
        if self._conversations.is_newest(before):
            return Continuation(said, options)
        return Restart(said, ends=True, token_ids=before.token_ids.tolist(), options=options)

    def _answer(self, asked: _Asked, turn: PolicyTurn) -> ChatAnswer:
        answer = ChatAnswer(
            id=f"chatcmpl-{self._num_answers}",
            content=turn.text,
            finish_reason="length" if turn.finish_reason == "length" else "stop",
            prompt_tokens=len(turn.context_ids) - turn.num_sampled,
            completion_tokens=turn.num_sampled,
        )
        if asked.reader is None:
            return answer
        parsed = self._formats.read(asked.reader, turn.marked_text)
        if not parsed.calls:
            return answer
        # Some templates print the id, so it must not be random. Mistral's want 9 letters or digits.
        calls = [
            {
                "id": f"call{self._num_answers:02d}{i:03d}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for i, call in enumerate(parsed.calls)
        ]
        return replace(answer, content=parsed.content, calls=calls, finish_reason="tool_calls")

    # The agent

    async def _run(self, prompt: EpisodePrompt) -> Any:
        if inspect.iscoroutinefunction(self._agent):
            return await call_awaited(self._agent, prompt, self._endpoint)
        # A thread of its own: a plain function waits for the answers in it.
        self.calls_in_threads.append(call := in_daemon_thread(call_plain, self._agent, prompt, self._endpoint))
        result = await asyncio.wrap_future(call)
        return await call_awaited(lambda: result) if inspect.isawaitable(result) else result

    def _result(self) -> Any:
        """What the agent returned. Raises CompleteError if it failed."""
        if self._task.cancelled():
            raise CompleteError("the agent was cancelled", kind="raised")
        try:
            return self._task.result()
        except UserCodeError as error:
            raise CompleteError(**error.after("the agent")) from error

    def _finish(self) -> Step:
        """The last step, which has the score. Raises CompleteError."""
        result = score = self._result()
        info: Any = {}
        if isinstance(result, Mapping):
            if unknown := [key for key in result if key not in ("score", "info")]:
                raise CompleteError(f"the agent returned the key {one_line(repr(unknown[0]))}; {RETURN}")
            score, info = result.get("score"), result.get("info") or {}
        if (number := as_number(score)) is None:
            raise CompleteError(
                f"the agent returned the score {kind_of_value(score)}; {RETURN}",
                fault=f"the agent returned a score of {type(score)}",
            )
        if not math.isfinite(number) or abs(number) > FLOAT32_MAX:
            raise CompleteError(
                f"the agent returned the score {number:g}; it must be finite and fit float32", permanent=False
            )
        try:
            read_info("the agent returned", info)
        except UserCodeError as error:
            raise CompleteError(**vars(error)) from None
        return Step(None, number, terminated=True, info=info)


def _options(request: ChatRequest) -> dict[str, Any]:
    return {"tools": [dict(tool) for tool in request.tools]} if request.tools else {}


def _settle(future: Future[ChatAnswer], answer: ChatAnswer) -> None:
    if future.set_running_or_notify_cancel():  # False: the client went away
        future.set_result(answer)


def _refuse(future: Future[ChatAnswer], error: RefusedError) -> None:
    if not future.done() and future.set_running_or_notify_cancel():
        future.set_exception(error)
