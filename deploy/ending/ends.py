"""How a command ends: every exception as one message and an exit code. Runs in the driver.

0: done. 1: a role or a machine failed. 2: the user can fix it. 129, 130, 143: stopped by SIGHUP, Ctrl-C, SIGTERM.
The traceback of what is no fault of the user goes to a file, which the message names.
"""

from __future__ import annotations

import errno
import os
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

FAILED, USERS = 1, 2
_FULL = (errno.ENOSPC, errno.EDQUOT)
_active = False  # the command line runs
_told: int | None = None  # the exit code, once the message was printed: what follows from an error is not told too
_run: tuple[str, Path] | None = None  # how to continue the run of this process, and its directory


def begins(directory: Path, remedy: str) -> None:
    """From here on a message ends with `remedy`, once something of the run is on disk; tracebacks are kept there."""
    global _run
    _run = remedy, directory


def remedy() -> tuple[str, Path | None]:
    """How to continue once something of the run is on disk, and its directory; "" and None where there is no run."""
    return _run or ("", None)


def main(app: Callable[..., Any]) -> None:
    """Runs the command line and exits with its code. Nothing but one message is printed, whatever happens."""
    global _active, _run, _told
    _active, _run, _told = True, None, None
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    signals.catch()
    code = FAILED
    try:
        code = _code(app)
    except BaseException as error:  # also what a user's module raises to end its own process
        with signals.held():
            code = tell(error)
    for stream in (Lenient("stdout"), Lenient("stderr")):
        stream.flush()
    signals.finished(code)
    sys.exit(code)


def _code(app: Callable[..., Any]) -> int:
    try:
        app()
    except SystemExit as end:
        # Typer makes these two exits of its own of them.
        if swallowed := _first(end, lambda cause: isinstance(cause, (KeyboardInterrupt, BrokenPipeError))):
            raise swallowed from None
        if isinstance(end.code, int):
            return end.code
        raise
    return 0


def tell(error: BaseException) -> int:
    """Prints the message of the error that ends the command, once, and returns the exit code. Elsewhere, where
    run_training is called from Python, it does nothing: the error itself is raised."""
    global _told
    if not _active:
        return FAILED
    if _told is None:
        _told, message = told(error)
        complain(message)
    return _told


def told(error: BaseException) -> tuple[int, str]:
    """Exit code and message."""
    if isinstance(error, KeyboardInterrupt):
        number = getattr(error, "number", signal.SIGINT)
        what = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        return 128 + number, f"{what}; {_advice() or 'nothing was begun'}"
    if (full := _first(error, _is_full)) is not None:
        return USERS, _full(full)
    if isinstance(error, UserError):
        return USERS, str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return USERS, _with_advice(f"{error.filename}: {error.strerror}; make it usable, or name another")
    kept = _keep(error)
    if isinstance(error, RoleError):
        return FAILED, _with_advice(f"{error}; details are in {kept}")
    last = str(error).strip().splitlines() or [""]
    return FAILED, _with_advice(
        f"{type(error).__name__}: {last[-1]}; this is a fault of Ratchet or of a library; the traceback is in {kept}"
    )


def _is_full(error: BaseException) -> bool:
    """Also by the words of libraries that do not pass on the number, such as safetensors."""
    return getattr(error, "errno", None) in _FULL or os.strerror(errno.ENOSPC) in str(error)


def _full(error: BaseException) -> str:
    name = getattr(error, "filename", None) or (_run[1] if _run else None)
    where = f" under {name}" if name else ""
    why = "the disk quota is used up" if getattr(error, "errno", None) == errno.EDQUOT else "the disk is full"
    return _with_advice(f"{why}{where}: what was being written is lost, what was written before is whole; make room")


def _advice() -> str:
    """How to continue, if anything was begun."""
    if _run is None:
        return ""
    remedy, directory = _run
    return remedy if begun(directory) else ""


def begun(directory: Path) -> bool:
    """Whether the directory holds a run, or a stage of the demo is one."""
    return any(directory.glob("config.toml")) or any(directory.glob("*/config.toml"))


def _with_advice(message: str) -> str:
    advice = "" if "--resume" in message else _advice()
    return f"{message}; {advice}" if advice else message


def errors_directory() -> Path:
    """RUN/errors, or a place outside where there is no run yet."""
    if _run is not None and begun(_run[1]):
        directory = _run[1] / "errors"
        directory.mkdir(exist_ok=True)
        return directory
    return Path(tempfile.gettempdir())


def _keep(error: BaseException) -> str:
    """Writes the traceback down and returns where."""
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
    """The error, what it follows from, and what a role raised, which Ray keeps in `cause`."""
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
