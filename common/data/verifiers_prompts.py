"""Prompts from tasksets of the package verifiers. Runs in the driver.

Another process imports the package and the taskset (verifiers_script.py), so the driver never holds their code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.data.file_formats import Located
from common.data.source_names import is_heldout
from common.errors import UserError
from common.optional_packages import require
from common.plain_text import one_line
from common.user_code.packages import package_root

FIELD = "verifiers"  # the field of a record that has the task
SCRIPT = Path(__file__).with_name("verifiers_script.py")


def taskset_prompts(taskset: str, setting: str) -> Iterator[Located]:
    """The tasks of a taskset, each as a record: its first messages, and in FIELD the task's data. One task in five is
    held out, by its hash, so no task is both in training and held out."""
    source = f"verifiers:{taskset}"
    require("verifiers", "verifiers", f"{setting} ({source})")
    request: dict[str, Any] = {"taskset": taskset, "heldout": is_heldout(setting), "path": [package_root(), *sys.path]}
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONPATH": package_root()},
    )
    if done.returncode:
        printed = done.stderr[-10_000:].strip().splitlines()
        last = one_line(printed[-1], 300) if printed else "it printed nothing"
        raise UserError(f"{setting} ({source}): the process that lists the tasks failed: {last}")
    for number, line in enumerate(done.stdout.splitlines(), 1):
        found = json.loads(line)
        if "error" in found:
            raise UserError(f"{setting} ({source}) cannot be used: {one_line(found['error'], 500)}")
        yield f"{source}, task {number}", found
