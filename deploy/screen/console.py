"""The terminal: text from outside is made harmless, and a failing terminal never ends a run. Runs in the driver.

Prompts, responses, void reasons and answers of services are text from outside: it may hold control characters that
move the cursor, set the title or write to the clipboard.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.text import Text

# Control characters except tab and newline; marks that change the direction of text; line ends of Unicode; halves of
# surrogate pairs, which no encoding can write. Joiners stay: some scripts need them.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]",
)

_NOWHERE = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, open to the end; used if the shell closed a stream


def printable(text: str) -> str:
    """`text` with every character that controls a terminal written out, such as \\x1b for escape."""
    return _UNPRINTABLE.sub(_written_out, text.replace("\r\n", "\n"))


def _written_out(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


class Lenient:
    """The current sys.stdout or sys.stderr, for writers that must not fail. A character that it cannot encode becomes
    "?". Once a write fails (closed pipe, full disk), everything goes to /dev/null."""

    def __init__(self, name: str = "stdout") -> None:
        self._name = name

    def write(self, text: str) -> int:
        stream = self._stream
        try:
            stream.write(text)
        except UnicodeEncodeError as error:
            with suppress(OSError, ValueError):
                stream.write(text.encode(error.encoding, "replace").decode(error.encoding))
        except (OSError, ValueError):
            _discard_from_now_on(stream)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            _discard_from_now_on(self._stream)

    def isatty(self) -> bool:
        with suppress(OSError, ValueError):
            return bool(self._stream.isatty())
        return False

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def fileno(self) -> int:
        return int(self._stream.fileno())

    @property
    def _stream(self) -> Any:
        return getattr(sys, self._name) or _NOWHERE


def _discard_from_now_on(stream: Any) -> None:
    """Sends the stream and the rest of its buffer to /dev/null. Otherwise Python would print an error at its exit,
    because it cannot write the buffer."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


class Output(Console):
    """The console of all commands: rich's markup and tables, with every text made printable."""

    def __init__(self) -> None:
        super().__init__(highlight=False, file=Lenient())  # type: ignore[arg-type]

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


_before_complaints: list[Callable[[], None]] = []


def call_before_complaints(action: Callable[[], None]) -> None:
    """Has `action` called before the next message on standard error, for example to remove a bar from the terminal. It
    replaces an earlier action."""
    _before_complaints[:] = [action]


def complain(message: str) -> None:
    """Writes one message to standard error."""
    while _before_complaints:
        _before_complaints.pop()()
    stream = Lenient("stderr")
    stream.write(f"ratchet: {printable(message)}\n")
    stream.flush()
