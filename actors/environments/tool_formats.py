"""The tools that agents give the model, and the calls that it writes. Runs in each environment replica."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from actors.environments.tools import ParsedTurn
from common.daemon_threads import answer, in_daemon_thread
from common.errors import UserError

Tools = Sequence[Mapping[str, Any]]  # their schemas


class CallReader(Protocol):
    """Reads the calls of a turn."""

    def read(self, text: str) -> ParsedTurn:
        """The calls in a turn's text, special tokens included."""


MAX_READERS = 64  # of the newest lists of tools. An agent may make another list in every episode


class ToolFormats:
    """Readers for the lists of tools that requests have. Agents of a replica share it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, make: Callable[[Tools], CallReader]) -> None:
        """`make` makes a reader. It raises UserError if the model's chat template cannot show the tools, or if the
        parser does not fit."""
        self._make = make
        self._readers: dict[str, CallReader | UserError] = {}
        self._lock: asyncio.Lock | None = None  # of the loop that runs the agents
        self._special = sorted(
            (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special), key=len, reverse=True
        )

    async def prepare(self, tools: Tools) -> CallReader | None:
        """The reader of these tools; None without tools. Keep it until the answer is read, because it may be dropped
        here before. Raises UserError if the tools cannot be used. Takes seconds for the first tools, in another
        thread."""
        if not tools:
            return None
        key = json.dumps(list(tools), sort_keys=True)
        self._lock = self._lock or asyncio.Lock()
        async with self._lock:
            found = self._readers.pop(key, None)
            if found is None:
                try:
                    found = await answer(in_daemon_thread(self._make, tools))
                except UserError as error:
                    found = error
            self._readers[key] = found  # the newest is the last one
            if len(self._readers) > MAX_READERS:
                del self._readers[next(iter(self._readers))]
        if isinstance(found, UserError):
            raise UserError(str(found))
        return found

    def read(self, reader: CallReader, text: str) -> ParsedTurn:
        """The calls in a turn's text, which has special tokens; `content` has none."""
        parsed = reader.read(text)
        content = parsed.content
        for token in self._special:
            content = content.replace(token, "")
        return ParsedTurn(parsed.calls, parsed.error, content)
