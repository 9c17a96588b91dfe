"""Calls a function in a new Python process: what one benchmark leaves in memory must not touch the next.

`worker=True` gives the process the environment that Ratchet gives its Ray workers, which decides how malloc behaves and
thereby both speed and memory.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any


def call(function: str, *args: Any, threads: int | None = None, worker: bool = False) -> Any:
    """`module:function`(*args), which come and go as JSON. `threads`: OMP_NUM_THREADS of the process. Raises
    CalledProcessError if it fails."""
    env = dict(os.environ)
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    if worker:
        from actors.pool import worker_environment

        env.update(worker_environment())
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "tests.bench.fresh", function, json.dumps(args), str(answer)]
        subprocess.run(command, env=env, check=True)
        return json.loads(answer.read_text(encoding="utf-8"))


def main() -> None:
    function, args, answer = sys.argv[1:]
    module, _, name = function.partition(":")
    result = getattr(importlib.import_module(module), name)(*json.loads(args))
    Path(answer).write_text(json.dumps(result, default=asdict), encoding="utf-8")


if __name__ == "__main__":
    main()
