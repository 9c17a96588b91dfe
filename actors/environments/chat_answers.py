"""Writes answers in the form of OpenAI's chat completions. Runs in each environment replica."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.environments.chat_requests import MODEL


@dataclass(frozen=True)
class ChatAnswer:
    """The model's answer to a request."""

    id: str
    content: str
    calls: Sequence[Mapping[str, Any]] = ()  # as `tool_calls` has them, arguments as text
    finish_reason: str = "stop"  # stop, length or tool_calls
    prompt_tokens: int = 0
    completion_tokens: int = 0
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def message(self) -> dict[str, Any]:
        """The message as the client gets it."""
        calls = {"tool_calls": [dict(call) for call in self.calls]} if self.calls else {}
        return {"role": "assistant", "content": self.content or (None if self.calls else ""), **calls}

    @property
    def usage(self) -> dict[str, int]:
        """The numbers of tokens."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


def completion(answer: ChatAnswer) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    choice = {"index": 0, "message": answer.message, "logprobs": None, "finish_reason": answer.finish_reason}
    return {**_head(answer, "chat.completion"), "choices": [choice], "usage": answer.usage}


def chunks(answer: ChatAnswer, *, include_usage: bool) -> Iterator[dict[str, Any]]:
    """The chunks of a streamed answer. They have the whole text in one piece, because an answer is complete before the
    agent gets its first part."""

    def chunk(delta: Mapping[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**_head(answer, "chat.completion.chunk"), "choices": [choice]}

    yield chunk({"role": "assistant", "content": ""})
    if answer.content:
        yield chunk({"content": answer.content})
    for index, call in enumerate(answer.calls):
        yield chunk({"tool_calls": [{"index": index, **call}]})
    yield chunk({}, answer.finish_reason)
    if include_usage:
        yield {**_head(answer, "chat.completion.chunk"), "choices": [], "usage": answer.usage}


def events(answer: ChatAnswer, *, include_usage: bool) -> bytes:
    """The same as server-sent events."""
    sent = [json.dumps(chunk, ensure_ascii=False) for chunk in chunks(answer, include_usage=include_usage)]
    return "".join(f"data: {data}\n\n" for data in [*sent, "[DONE]"]).encode()


def _head(answer: ChatAnswer, kind: str) -> dict[str, Any]:
    return {"id": answer.id, "object": kind, "created": answer.created, "model": MODEL}
