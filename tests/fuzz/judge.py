"""A fuzzed call may return a value or raise UserError with one message, in time, and leaves no file behind."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from common.errors import UserError

LIMIT_S = 20.0  # a case takes milliseconds: also on a busy machine only a hang takes longer
LONGEST_MESSAGE = 8000  # characters; a config's message may list dozens of faults

Value = TypeVar("Value")


class Hang(BaseException):
    """Not an Exception, because the code under test may catch those."""


class WrongAnswer(AssertionError):
    """The call ended in a way that is not allowed."""


@contextmanager
def limited(seconds: float = LIMIT_S) -> Iterator[None]:
    """Raises Hang in the main thread after this many seconds. Only the main thread may call it."""

    def stop(*_: object) -> None:
        raise Hang(f"still running after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def value_or_message(call: Callable[[], Value], scratch: Path, *, may_write: tuple[str, ...] = ()) -> Value | str:
    """Returns what `call` returned, or the message of its UserError. Passes on any other exception."""
    before = files(scratch)
    try:
        with limited():
            found: Value | str = call()
    except UserError as error:
        found = str(error)
        check_message(found)
    if left := files(scratch) - before - set(may_write):
        raise WrongAnswer(f"files were left behind: {sorted(left)}")
    return found


def files(directory: Path) -> set[str]:
    """Everything below a directory."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def check_message(message: str) -> None:
    """Raises WrongAnswer unless a person can read the message: not empty, not too long, without a traceback."""
    if not message.strip() or message != message.strip("\n"):
        raise WrongAnswer(f"a message must not be empty, nor begin or end with an empty line: {message!r}")
    if len(message) > LONGEST_MESSAGE:
        raise WrongAnswer(f"a message of {len(message)} characters: {message[:500]!r} ...")
    if "Traceback (most recent call last)" in message or re.search(r'File ".*\.py", line \d+', message):
        raise WrongAnswer(f"a message with a traceback: {message!r}")
    if re.search(r"\n\s*\n", message):
        raise WrongAnswer(f"a message with an empty line in it: {message!r}")
