"""RUN/run.json marks a directory as made by Ratchet: the command, the starting directory and the versions.

Runs in the driver.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.files import write_json
from common.user_code.import_path import users_directories
from deploy.run.provenance import start_record

RECORD = "run.json"
_MARK = "ratchet_run"  # a key that only Ratchet writes; its value is the version of the layout


def read_record(directory: Path) -> dict[str, Any]:
    """RUN/run.json; {} if there is none, or if Ratchet did not write it."""
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) and _MARK in record else {}


def write_first_record(directory: Path, command: str) -> None:
    """Writes the record of a new run."""
    start = start_record()
    _write(directory, {"command": command, "directory": start["directory"], "starts": [start]})


def add_start(directory: Path) -> None:
    """Adds this start of a continued run to the record."""
    record = read_record(directory)
    starts = record.get("starts")
    _write(directory, {**record, "starts": [*(starts if isinstance(starts, list) else []), start_record()]})


def remember_journal(directory: Path, digest: str) -> None:
    """Adds the SHA-256 of the journal's first entry, by which later starts recognise the run's own journal."""
    record = read_record(directory)
    if digest and record.get("journal") != digest:
        _write(directory, {**record, "journal": digest})


def _write(directory: Path, record: dict[str, Any]) -> None:
    if record.get("directory") is not None:
        record.setdefault("import_from", list(users_directories()))
    write_json(directory / RECORD, {_MARK: 1, **record}, durably=True)
