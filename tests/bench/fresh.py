"""Calls a function in a new Python process: what one benchmark leaves in memory must not touch the next."""

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

from actors.pool.ray_actor import worker_environment
from common.config.base import Placed


def call(function: str, *args: Any, threads: int | None = None, worker: Placed | None = None) -> Any:
    """`module:function`(*args), which come and go as JSON.

    `worker` gives the process the environment of Ratchet's Ray workers with that section, which decides how malloc
    behaves and thereby both speed and memory. `threads`: OMP_NUM_THREADS. Raises CalledProcessError if it fails.
    """
    env = os.environ | (worker_environment(worker) if worker else {})
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
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
