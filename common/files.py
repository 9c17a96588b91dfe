"""Writes files and directories so that a crash leaves nothing half written, or a line to skip. Runs anywhere."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Replaces the file with `text`. A reader sees the old text or the new text, never a part of one."""
    staging = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        staging.write_text(text, encoding="utf-8")
        staging.rename(path)
    finally:
        staging.unlink(missing_ok=True)  # does nothing after the rename


def write_json(path: Path, value: Any) -> None:
    """Replaces the file with a value as indented JSON, like `write_whole`."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Appends one JSON line. It starts on a new line even if a crash left an unfinished line before it."""
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; an empty list if there is no file. Skips a line that a crash cut short."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


@contextmanager
def replaced_directory(target: Path) -> Iterator[Path]:
    """Yields a temporary directory, which replaces `target` if the block ends without an error. A crash between the
    removal of the old directory and the rename leaves no `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        yield staging
        if target.exists():
            shutil.rmtree(target)
        staging.chmod(0o755)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
