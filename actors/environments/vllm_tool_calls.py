"""Finds the tool calls in what a model wrote, with vLLM's own parsers. Runs in each environment replica with tools.

Importing it takes about 4 s and 140 MB more than the tokenizer does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.tokenizers.hf import get_cached_tokenizer
from vllm.tool_parsers import ToolParser, ToolParserManager

from actors.environments.tools import ParsedTurn, ToolCall
from common.errors import UserError

_SETTING = "environment.tool_parser"


class ToolCallReader:
    """Reads the calls that one model writes."""

    def __init__(self, parser: str, tokenizer: PreTrainedTokenizerBase, schemas: Sequence[Mapping[str, Any]]) -> None:
        """Raises UserError for a parser that vLLM does not have or that does not fit the tokenizer."""
        try:
            self._kind: type[ToolParser] = ToolParserManager.get_tool_parser(parser)
        except KeyError:
            known = ", ".join(ToolParserManager.list_registered())
            raise UserError(f'{_SETTING} ("{parser}") is unknown to vLLM; it has {known}') from None
        self._tokenizer = _with_vocabulary(tokenizer)
        self._request = ChatCompletionRequest(messages=[], model="", tools=[dict(schema) for schema in schemas])
        try:
            self.read("")
        except Exception as error:
            raise UserError(
                f'{_SETTING} ("{parser}") does not fit the model: {type(error).__name__}: {error}; name the parser '
                "that vLLM's documentation gives for this model"
            ) from error

    def read(self, text: str) -> ParsedTurn:
        """The calls in a turn's text, special tokens included. Text that the parser does not take for a call has
        none."""
        # A new parser for each turn, as in vLLM's server: some keep a state.
        parser = self._kind(self._tokenizer, self._request.tools)
        with _logged_failures(self._kind) as failures:
            found = parser.extract_tool_calls(text, self._request)
        calls = [ToolCall(call.function.name, call.function.arguments) for call in found.tool_calls]
        content = (found.content or "") if calls else ""
        return ParsedTurn(calls, "" if calls or not failures else failures[0], content)


@lru_cache(maxsize=1)  # a process has one policy, but may have many readers
def _with_vocabulary(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The tokenizer with a stored dictionary of its vocabulary. The plain one makes this dictionary whenever a parser
    asks for it."""
    return get_cached_tokenizer(tokenizer)


@contextmanager
def _logged_failures(kind: type[ToolParser]) -> Iterator[list[str]]:
    """Collects the exceptions that a parser logs, and keeps them out of the log. A parser that fails says so only
    there: it returns the text without calls. A policy that learns to call tools makes it fail often."""
    failures: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            failures.append(f"{type(error).__name__}: {error}")
        return error is None

    loggers = [logging.getLogger(parent.__module__) for parent in kind.__mro__]
    for logger in loggers:
        logger.addFilter(collect)
    try:
        yield failures
    finally:
        for logger in loggers:
            logger.removeFilter(collect)
