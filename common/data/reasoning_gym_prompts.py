"""Prompts from tasks of the package reasoning-gym (arXiv:2505.24760). Runs in the driver.

Another process makes the questions (reasoning_gym_script.py): some tasks depend on the order of Python's sets, which is
the same in every run only if a process starts with PYTHONHASHSEED=0.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from common.config.actors import ReasoningGymConfig
from common.data.file_formats import Located
from common.data.source_names import is_heldout
from common.errors import UserError
from common.optional_packages import require
from common.plain_text import one_line
from common.user_code.packages import package_root

FIELD = "reasoning_gym"  # the field of a record that says how its answers are scored
SCRIPT = Path(__file__).with_name("reasoning_gym_script.py")


def task_prompts(task: str, setting: str, cfg: ReasoningGymConfig, *, seed: int) -> Iterator[Located]:
    """Different questions of a task, each as a record: `prompt`, the entry's `question`, `answer` and `metadata`, and
    FIELD. One question in five is held out with every seed, so no question is both in training and held out."""
    source = f"reasoning-gym:{task}"
    require("reasoning_gym", "reasoning-gym", f"{setting} ({source})")
    heldout = is_heldout(setting)
    request = {
        "task": task,
        "parameters": dict(cfg.parameters),
        "count": cfg.heldout_prompts if heldout else cfg.train_prompts,
        "heldout": heldout,
        "seed": seed,
    }
    rule: dict[str, Any] = {}
    for number, found in enumerate(_answers(request, f"{setting} ({source})")):
        if "error" in found:
            raise UserError(f"{setting} ({source}): {found['error']}")
        if not number:
            rule = {"task": task, "parameters": request["parameters"], **found}
            continue
        prompt = cfg.template.replace("{question}", found["question"])
        yield f"{source}, question {number}", {"prompt": prompt, **found, FIELD: rule}


def _answers(request: dict[str, Any], what: str) -> Iterator[dict[str, Any]]:
    """The lines that the script prints, each of them an object. Raises UserError if it fails."""
    path = os.pathsep.join(filter(None, [package_root(), os.environ.get("PYTHONPATH")]))
    with (
        TemporaryFile() as errors,
        subprocess.Popen(
            [sys.executable, "-P", str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"},
        ) as process,
    ):
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(request))
            process.stdin.close()
            yield from map(json.loads, process.stdout)
            if process.wait():
                raise UserError(f"{what}: the process that makes the questions failed: {_last_line(errors)}")
        finally:
            process.kill()


def _last_line(output: IO[bytes]) -> str:
    output.seek(0)
    lines = output.read()[-10_000:].decode(errors="replace").strip().splitlines()
    return one_line(lines[-1], 300) if lines else "it printed nothing"
