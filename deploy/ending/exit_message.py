"""The end of a command: every exception becomes one message and an exit code. Runs in the driver.

0: success. 1: a role or a machine failed. 2: the user can fix it. 129, 130, 143: stopped by SIGHUP, Ctrl-C, SIGTERM.
141, without a message: the program that read the output has ended, as in `ratchet config --describe | head`.
If the user cannot fix it, the traceback goes to a file that the message names.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.errors import RoleError, UserError
from deploy.ending import signals
from deploy.screen.console import Lenient, complain

FAILED, USERS_FAULT, NO_READER = 1, 2, 128 + signal.SIGPIPE
_FULL = (errno.ENOSPC, errno.EDQUOT)
_active = False  # the command line runs
_printed: int | None = None  # the exit code, once a message was printed; later errors follow from it and print nothing
_run: tuple[str, Path] | None = None  # how to continue the run of this process, and its directory


def run_begins(directory: Path, remedy: str) -> None:
    """From now on messages end with `remedy`, and tracebacks go to the run directory, once it has a config."""
    global _run
    _run = remedy, directory


def how_to_continue() -> tuple[str, Path | None]:
    """The remedy, and the run directory, which must have a config for the remedy to apply. "" and None without a
    run."""
    return _run or ("", None)


def main(app: Callable[..., Any]) -> None:
    """Runs the command line and exits with its code. Prints at most one message."""
    global _active, _run, _printed
    _active, _run, _printed = True, None, None
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    signals.install_handlers()
    code = FAILED
    try:
        code = _code(app)
    except BaseException as error:  # a signal raises Stopped, and a user's module may raise SystemExit
        with signals.uninterrupted():
            code = NO_READER if _has_no_reader(error) else print_once(error)
    for stream in (Lenient("stdout"), Lenient("stderr")):
        stream.flush()
    signals.exit_process(code)
    sys.exit(code)


def _code(app: Callable[..., Any]) -> int:
    try:
        app()
    except SystemExit as end:
        # Typer turns these two errors into exits of its own.
        if swallowed := _first(end, lambda cause: isinstance(cause, (KeyboardInterrupt, BrokenPipeError))):
            raise swallowed from None
        if isinstance(end.code, int):
            return end.code
        raise
    return 0


def _has_no_reader(error: BaseException) -> bool:
    """True if the error is that the pipe of standard output has no reader any more. A connection that breaks raises the
    same error."""
    with suppress(OSError, ValueError, AttributeError):
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return isinstance(error, BrokenPipeError) and any(events & select.POLLERR for _, events in poll.poll(0))
    return False


def print_once(error: BaseException) -> int:
    """Prints the message of the error that ends the command, once, and returns the exit code. Without the command line,
    as when Python code calls run_training, it prints nothing: the caller gets the error itself."""
    global _printed
    if not _active:
        return FAILED
    if _printed is None:
        _printed, message = code_and_message(error)
        complain(message)
    return _printed


def code_and_message(error: BaseException) -> tuple[int, str]:
    """The exit code and the message of an error."""
    if isinstance(error, KeyboardInterrupt):
        number = getattr(error, "number", signal.SIGINT)
        what = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        return 128 + number, f"{what}; {_advice() or 'nothing was begun'}"
    if (full := _first(error, _is_full)) is not None:
        return USERS_FAULT, _full_disk_message(full)
    if isinstance(error, UserError):
        return USERS_FAULT, str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return USERS_FAULT, _with_advice(f"{error.filename}: {error.strerror}; make it usable, or name another")
    file = _save_traceback(error)
    if isinstance(error, RoleError):
        return FAILED, _with_advice(f"{error}; details are in {file}")
    last = str(error).strip().splitlines() or [""]
    return FAILED, _with_advice(
        f"{type(error).__name__}: {last[-1]}; this is a fault of Ratchet or of a library; the traceback is in {file}"
    )


def _is_full(error: BaseException) -> bool:
    """True if a disk is full. Some libraries, such as safetensors, only give the words of the error, not its number."""
    return getattr(error, "errno", None) in _FULL or os.strerror(errno.ENOSPC) in str(error)


def _full_disk_message(error: BaseException) -> str:
    name = getattr(error, "filename", None) or (_run[1] if _run else None)
    where = f" under {name}" if name else ""
    why = "the disk quota is used up" if getattr(error, "errno", None) == errno.EDQUOT else "the disk is full"
    return _with_advice(f"{why}{where}: the file being written is lost, earlier files are complete; free some space")


def _advice() -> str:
    """The remedy, if the run has a config on disk."""
    if _run is None:
        return ""
    remedy, directory = _run
    return remedy if has_config(directory) else ""


def has_config(directory: Path) -> bool:
    """True if the directory, or a directory in it (a stage of the demo), has a run's config."""
    return any(directory.glob("config.toml")) or any(directory.glob("*/config.toml"))


def _with_advice(message: str) -> str:
    advice = "" if "--resume" in message else _advice()
    return f"{message}; {advice}" if advice else message


def errors_directory() -> Path:
    """RUN/errors, or the directory for temporary files while there is no run yet."""
    if _run is not None and has_config(_run[1]):
        directory = _run[1] / "errors"
        directory.mkdir(exist_ok=True)
        return directory
    return Path(tempfile.gettempdir())


def _save_traceback(error: BaseException) -> str:
    """Writes the traceback into a file and returns its name."""
    text = "".join(traceback.format_exception(error))
    name = f"ratchet-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for directory in (errors_directory, lambda: Path(tempfile.gettempdir())):
        with suppress(OSError):
            path = directory() / name
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
            return str(path)
    return "no file, since none can be written"


def _first(error: BaseException, wanted: Callable[[BaseException], bool]) -> BaseException | None:
    return next((cause for cause in causes(error) if wanted(cause)), None)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, all errors that it follows from, and the errors that roles raised, which Ray keeps in `cause`."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        if (one := waiting.pop(0)) is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        inner = getattr(one, "cause", None)
        waiting += [one.__cause__, one.__context__, inner if isinstance(inner, BaseException) else None]
        waiting += one.exceptions if isinstance(one, BaseExceptionGroup) else ()
