"""Reads requests in the form of OpenAI's chat completions. Runs in each environment replica.

If the run cannot follow a setting of a request, the request is refused, and the error names the setting. A setting is
ignored only if it would not change the answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.config.actors import SamplingConfig
from common.data.json_values import json_values, shown
from common.data.messages import Message
from common.errors import UserError

MODEL = "policy"  # the name of the model in requests
# Settings that change nothing about an answer.
_WITHOUT_EFFECT = (
    *("user", "metadata", "store", "stream_options", "service_tier", "prompt_cache_key", "safety_identifier"),
    "prompt_cache_retention",
)
_READ = ("model", "messages", "tools", "stream")
_MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id")
_ROLES = ("system", "developer", "user", "assistant", "tool")


class RefusedError(Exception):
    """A request that is not answered by the model, with the HTTP status and OpenAI's `code` and `param`."""

    def __init__(self, message: str, *, status: int = 400, code: str = "unsupported_value", param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's form of an error."""
        error = {"message": str(self), "type": "invalid_request_error", "param": self.param, "code": self.code}
        return {"error": error}


@dataclass(frozen=True)
class ChatRequest:
    """A request that the model can answer. Its messages are normalised, so that equal messages compare equal: contents
    are text, keys without a value are missing, and arguments of calls are objects if possible."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()  # for the chat template
    stream: bool = False
    include_usage: bool = False  # a last chunk with the numbers of tokens


class RequestReader:
    """Reads the requests of a run."""

    def __init__(self, sampling: SamplingConfig) -> None:
        """`sampling`: of the run, which every answer is sampled with."""
        self._most_tokens = sampling.max_new_tokens
        # The values that a request may have, by setting; and what the run calls it.
        self._fixed: dict[str, tuple[tuple[Any, ...], str]] = {
            "temperature": ((sampling.temperature,), "sampling.temperature"),
            "top_p": ((sampling.top_p,), "sampling.top_p"),
            "top_k": ((sampling.top_k, *(() if sampling.top_k else (-1,))), "sampling.top_k"),
            "min_tokens": ((sampling.min_new_tokens,), "sampling.min_new_tokens"),
        }
        stops: list[Any] = [list(sampling.stop)]
        if len(sampling.stop) == 1:
            stops.append(sampling.stop[0])
        self._fixed["stop"] = (tuple(stops), "sampling.stop")
        # Settings that the endpoint does not have; only their neutral values are accepted.
        self._neutral: dict[str, tuple[Any, ...]] = {
            "n": (1,),
            "logprobs": (False,),
            "top_logprobs": (0,),
            "response_format": ({"type": "text"},),
            "frequency_penalty": (0,),
            "presence_penalty": (0,),
            "repetition_penalty": (1,),
            "min_p": (0,),
            "logit_bias": ({},),
            "tool_choice": ("auto",),
            "parallel_tool_calls": (True,),
            "modalities": (["text"],),
            "verbosity": ("medium",),
        }

    def read(self, body: bytes) -> ChatRequest:
        """The request in the body of an HTTP request. Raises RefusedError that names the rule, the value and the
        remedy."""
        try:
            given = json.loads(body)
            asked = json_values("the request", given)
        except (UserError, ValueError, RecursionError) as error:
            raise RefusedError(f"the body must be a JSON object: {error}", code="invalid_body") from None
        given = {key: value for key, value in asked.items() if value is not None}
        if (model := given.get("model", MODEL)) != MODEL:
            raise RefusedError(
                f"model ({shown(model)}) must be {MODEL!r}, the model of this endpoint; use endpoint.model, and send "
                "requests for another model to its own endpoint",
                status=404,
                code="model_not_found",
                param="model",
            )
        for name, value in given.items():
            self._check(name, value)
        messages = _messages(given.get("messages"))
        options = given.get("stream_options")
        return ChatRequest(
            messages=messages,
            tools=_tools(given.get("tools", [])),
            stream=_flag("stream", given.get("stream", False)),
            include_usage=isinstance(options, dict) and bool(options.get("include_usage")),
        )

    def _check(self, name: str, value: Any) -> None:
        if name in _READ or name in _WITHOUT_EFFECT:
            return
        if name in ("max_tokens", "max_completion_tokens"):
            if not isinstance(value, int) or isinstance(value, bool) or value < self._most_tokens:
                raise RefusedError(
                    f"{name} ({shown(value)}) must not be below sampling.max_new_tokens ({self._most_tokens}) of the "
                    "run, which bounds every answer; leave it out, or change sampling.max_new_tokens",
                    param=name,
                )
        elif name in self._fixed:
            allowed, setting = self._fixed[name]
            if value not in allowed or isinstance(value, bool):
                raise RefusedError(
                    f"{name} ({shown(value)}) must be {setting} of the run ({shown(allowed[0])}), which samples every "
                    f"answer; leave it out, or change {setting}",
                    param=name,
                )
        elif name in self._neutral:
            if value not in self._neutral[name] or isinstance(value, bool) != isinstance(self._neutral[name][0], bool):
                raise RefusedError(
                    f"{name} ({shown(value)}) is not supported by this endpoint, which has only "
                    f"{shown(self._neutral[name][0])}; leave it out",
                    param=name,
                )
        else:
            raise RefusedError(
                f"{name} ({shown(value)}) is not supported by this endpoint; leave it out",
                code="unsupported_parameter",
                param=name,
            )


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RefusedError(f"{name} ({shown(value)}) must be true or false", param=name)
    return value


def _tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list):
        raise RefusedError(f"tools ({shown(value)}) must be a list; give functions, or leave it out", param="tools")
    for tool in value:
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RefusedError(
                f'tools: {shown(tool)} must be {{"type": "function", "function": {{"name": ...}}}}; other kinds of '
                "tools are not supported",
                param="tools",
            )
        for key, kind, what in (("description", str, "text"), ("parameters", dict, "an object (a JSON schema)")):
            if (given := function.get(key)) is not None and not isinstance(given, kind):
                raise RefusedError(
                    f"tools: {key} ({shown(given)}) of the function {function['name']} must be {what}; correct "
                    "it, or leave it out",
                    param="tools",
                )
        if function.get("strict"):
            raise RefusedError(
                f"tools: strict (true) of the function {function['name']} is not supported by this endpoint; leave it "
                "out",
                param="tools",
            )
    return tuple(value)


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise RefusedError(f"messages ({shown(value)}) must be a list of at least one message", param="messages")
    found = tuple(canonical_message(message, f"messages[{i}]") for i, message in enumerate(value))
    if found[-1]["role"] == "assistant":
        raise RefusedError(
            f"messages[{len(found) - 1}] is the assistant's, but the model does not continue a message of its own; end "
            "with a message of another role",
            param="messages",
        )
    return found


def canonical_message(message: Any, where: str = "message") -> Message:
    """A message in normal form (see ChatRequest). Raises RefusedError that begins with `where`."""
    if not isinstance(message, Mapping):
        raise RefusedError(f"{where} ({shown(message)}) must be an object with role and content", param="messages")
    # Clients send back what they got with all keys of their own types: those without a value say nothing.
    given = {key: value for key, value in message.items() if value is not None and value != []}
    if unknown := [key for key in given if key not in _MESSAGE_KEYS]:
        raise RefusedError(
            f"{where}: {unknown[0]} ({shown(given[unknown[0]])}) is not supported by this endpoint; messages have "
            f"{', '.join(_MESSAGE_KEYS)}",
            code="unsupported_parameter",
            param="messages",
        )
    if given.get("role") not in _ROLES:
        raise RefusedError(
            f"{where} has the role {shown(given.get('role'))}; it must be one of {', '.join(_ROLES)}", param="messages"
        )
    found: Message = {"role": "system" if given["role"] == "developer" else given["role"]}
    found["content"] = _content(given.get("content", ""), where, nul=found["role"] == "assistant")
    for key in ("name", "tool_call_id"):
        if key in given:
            if not isinstance(given[key], str):
                raise RefusedError(f"{where}: {key} ({shown(given[key])}) must be text", param="messages")
            found[key] = given[key]
    if "tool_calls" in given:
        found["tool_calls"] = _calls(given["tool_calls"], where)
    if not found["content"] and found["role"] not in ("tool", "assistant"):
        raise RefusedError(f"{where} has no content; give it some text, or leave it out", param="messages")
    return found


def _content(value: Any, where: str, *, nul: bool) -> str:
    """The text of a message. `nul`: the character NUL may be in it, because the model can write it."""
    parts = value if isinstance(value, list) else [{"type": "text", "text": value}]
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise RefusedError(
                f"{where} has the content {shown(part)}; this endpoint has a model of text, so it must be text",
                param="messages",
            )
        texts.append(text)
    text = "".join(texts)
    if "\0" in text and not nul:
        raise RefusedError(f"{where} has the character NUL, which is not text; remove it", param="messages")
    return text


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    found = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RefusedError(
                f"{where} has the tool call {shown(call)}; a call has id, type and function with name and arguments",
                param="messages",
            )
        arguments = function.get("arguments", "")
        found.append(
            {
                "id": str(call.get("id", "")),
                "type": "function",
                "function": {"name": function["name"], "arguments": _object_if_it_is_one(arguments)},
            }
        )
    return found


def _object_if_it_is_one(arguments: Any) -> Any:
    """Chat templates want the arguments of a call as an object, as vLLM's server gives them. An object that no message
    may have, such as one with half of a surrogate pair, remains text: the model can write it as JSON."""
    if not isinstance(arguments, str):
        return arguments
    try:
        read = json.loads(arguments or "{}")
        if isinstance(read, dict):
            json_values("the message", {"tool_calls": [{"function": {"arguments": read}}]})
            return read
    except (UserError, ValueError, RecursionError):
        pass
    return arguments
