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


class ToolFormats:
    """A reader for every list of tools that a request has had. Agents of a replica share it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, make: Callable[[Tools], CallReader]) -> None:
        """`make` makes a reader. It raises UserError if the model's chat template cannot show the tools, or if the
        parser does not fit."""
        self._make = make
        self._readers: dict[str, CallReader | UserError] = {}
        self._lock: asyncio.Lock | None = None  # of the loop that runs the agents
        self._special = sorted(
            (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special), key=len, reverse=True
        )

    async def prepare(self, tools: Tools) -> None:
        """Makes the reader of these tools, if there is none yet. Raises UserError if they cannot be used. Takes
        seconds for the first tools, in another thread."""
        if not tools:
            return
        self._lock = self._lock or asyncio.Lock()
        async with self._lock:
            if (key := _key(tools)) not in self._readers:
                try:
                    self._readers[key] = await answer(in_daemon_thread(self._make, tools))
                except UserError as error:
                    self._readers[key] = error
        if isinstance(found := self._readers[key], UserError):
            raise found

    def read(self, tools: Tools, text: str) -> ParsedTurn:
        """The calls in a turn's text, which has special tokens; `content` has none."""
        reader = self._readers[_key(tools)]
        assert not isinstance(reader, UserError)
        parsed = reader.read(text)
        content = parsed.content
        for token in self._special:
            content = content.replace(token, "")
        return ParsedTurn(parsed.calls, parsed.error, content)


def _key(tools: Tools) -> str:
    return json.dumps(list(tools), sort_keys=True)
