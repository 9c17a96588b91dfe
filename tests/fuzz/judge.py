"""What a fuzzed call may do: give a value or raise UserError with one message, in time, and leave no file behind."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from common.errors import UserError

LIMIT_S = 20.0  # for what takes milliseconds: only a hang takes longer, also on a busy machine
LONGEST_MESSAGE = 8000  # characters; a config's message may list dozens of faults

Value = TypeVar("Value")


class Hang(BaseException):
    """No Exception: what is fuzzed may catch those."""


class WrongAnswer(AssertionError):
    """The call ended as no call may."""


@contextmanager
def limited(seconds: float = LIMIT_S) -> Iterator[None]:
    """Raises Hang in this, the main thread when that many seconds have passed."""

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
    """What `call` returned, or the message of its UserError. Any other exception is the caller's."""
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
    """One message that a person can read: some text, of bounded length, without a traceback in it."""
    if not message.strip() or message != message.strip("\n"):
        raise WrongAnswer(f"a message must say something, in lines that belong together: {message!r}")
    if len(message) > LONGEST_MESSAGE:
        raise WrongAnswer(f"a message of {len(message)} characters: {message[:500]!r} ...")
    if "Traceback (most recent call last)" in message or re.search(r'File ".*\.py", line \d+', message):
        raise WrongAnswer(f"a message with a traceback: {message!r}")
    if re.search(r"\n\s*\n", message):
        raise WrongAnswer(f"a message with an empty line in it: {message!r}")
