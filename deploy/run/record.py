"""RUN/run.json: that Ratchet made the directory, with which command, from where and with which versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.files import write_json
from common.user_code.import_path import users_directories
from deploy.run.provenance import start_record

RECORD = "run.json"
_MARK = "ratchet_run"  # the key that nothing else writes; its value is the version of the layout


def read_record(directory: Path) -> dict[str, Any]:
    """RUN/run.json; empty where there is none, or one that Ratchet did not write."""
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) and _MARK in record else {}


def write_first_record(directory: Path, command: str) -> None:
    """Says that the directory is a run's."""
    start = start_record()
    _write(directory, {"command": command, "directory": start["directory"], "starts": [start]})


def add_start(directory: Path) -> None:
    """Adds that the run is continued now."""
    record = read_record(directory)
    starts = record.get("starts")
    _write(directory, {**record, "starts": [*(starts if isinstance(starts, list) else []), start_record()]})


def _write(directory: Path, record: dict[str, Any]) -> None:
    if record.get("directory") is not None:
        record.setdefault("import_from", list(users_directories()))
    write_json(directory / RECORD, {_MARK: 1, **record})
