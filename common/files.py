"""Writes files and directories so that a crash leaves no partial file. A line cut short is skipped when it is read.
Runs anywhere."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.errors import UserError


def write_whole(path: Path, text: str) -> None:
    """Replaces the file with `text`. A reader sees the old text or the new text, never a part of one."""
    with replaced_file(path) as staging:
        staging.write_text(text, encoding="utf-8")


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path. The file that the block writes there replaces `path` if the block ends without an
    error."""
    staging = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield staging
        staging.rename(path)
    finally:
        staging.unlink(missing_ok=True)  # does nothing after the rename


def check_replaces(path: Path, beginning: str, command: str, *, otherwise: str) -> None:
    """Raises UserError if `command` would replace a file that it did not write: every file of the command starts with
    `beginning`. An empty file may be replaced. `otherwise`: what the user can name instead."""
    if not os.path.lexists(path):
        return
    with open(path, "rb") as file:
        found = file.read(len(beginning.encode()))
    if found not in (b"", beginning.encode()):
        raise UserError(
            f"{path} does not begin like the files that {command} writes in this version, so it is not replaced; "
            f"delete it or name {otherwise}"
        )


def write_json(path: Path, value: Any, *, durably: bool = False) -> None:
    """Replaces the file with a value as indented JSON, like `write_whole` or `write_durably`."""
    write = write_durably if durably else write_whole
    write(path, json.dumps(value, indent=2) + "\n")


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Appends one JSON line. It starts on a new line even if a crash left an unfinished line before it."""
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; an empty list if there is no file. Skips a line that is not a JSON object,
    such as one that a crash cut short."""
    if not path.exists():
        return []
    records = (read_record(line) for line in path.read_bytes().splitlines())
    return [record for record in records if record is not None]


def read_record(line: bytes) -> dict[str, Any] | None:
    """The JSON object in a line; None if the line is anything else. A whole number that no float can hold becomes
    infinite, so readers can calculate with every number."""
    with suppress(ValueError, RecursionError):  # ValueError: not UTF-8, or not JSON
        record = json.loads(line, parse_int=_whole_number)
        return record if isinstance(record, dict) else None
    return None


def _whole_number(digits: str) -> int | float:
    """An int; a float from 300 digits on. Arithmetic with floats raises OverflowError for ints of more than 308."""
    return int(digits) if len(digits) < 300 else float(digits)


def write_durably(path: Path, text: str) -> None:
    """Replaces the file with `text`, like `write_whole`. When it returns, the file survives a loss of power too."""
    with replaced_file(path) as staging, open(staging, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until the contents of the file, or the names in the directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """Yields a temporary directory `.NAME-XXXXXXXX`, which replaces `target` if the block ends without an error. The
    old directory is renamed to `.NAME-XXXXXXXX-old` first, and removed last: a crash in between loses neither. At the
    end the new directory and its files survive a loss of power too."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    old = staging.with_name(f"{staging.name}-old")
    try:
        yield staging
        staging.chmod(0o755)
        for path in staging.rglob("*"):
            sync(path)
        sync(staging)
        if os.path.lexists(target):
            target.rename(old)
        staging.rename(target)
        sync(target.parent)
        if old.is_symlink():
            old.unlink()
        shutil.rmtree(old, ignore_errors=True)
    finally:
        if os.path.lexists(old) and not os.path.lexists(target):  # the second rename failed
            old.rename(target)
        shutil.rmtree(staging, ignore_errors=True)
