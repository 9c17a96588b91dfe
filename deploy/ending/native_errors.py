"""Sends the messages of C++ code to a file and leaves Python's on the terminal. Runs in the driver."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def native_errors_to(path: Path) -> Iterator[None]:
    """During the block, file descriptor 2 is this file, and sys.stderr writes to the former descriptor 2. When a
    process dies, Ray's C++ code prints paragraphs and stacks to descriptor 2."""
    try:
        terminal = os.dup(2)
    except OSError:  # the shell has closed it
        yield
        return
    before = sys.stderr
    with open(path, "ab") as file:
        _flush()
        os.dup2(file.fileno(), 2)
        if _descriptor(before) == 2:
            sys.stderr = open(  # noqa: SIM115, its descriptor is closed below
                terminal, "w", buffering=1, encoding=before.encoding, errors=before.errors, closefd=False
            )
        ours = not faulthandler.is_enabled()
        if ours:
            faulthandler.enable(file)  # otherwise Ray enables it on the terminal
        try:
            yield
        finally:
            if ours:
                faulthandler.disable()
            _flush()
            sys.stderr = before
            os.dup2(terminal, 2)
            os.close(terminal)


def _flush() -> None:
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.flush()


def _descriptor(stream: object) -> int | None:
    with suppress(OSError, ValueError, AttributeError):
        return stream.fileno()  # type: ignore[attr-defined, no-any-return]
    return None
