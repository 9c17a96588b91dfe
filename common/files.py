"""Files that are there whole or not at all, whoever reads meanwhile or ends the process that writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """In place of what was there."""
    staging = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        staging.write_text(text, encoding="utf-8")
        staging.rename(path)
    finally:
        staging.unlink(missing_ok=True)  # it has its new name by now, or is worth nothing


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2) + "\n")
