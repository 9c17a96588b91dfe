"""The first command of the README on the device: the whole system with Ray and vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.util import find_spec

from tests.gpu_check.run import Run

SHARES = ["generators.gpus=0.4", "reference.gpus=0.1", "reward.gpus=0.1", "learner.gpus=0.4"]  # those of the Makefile


def check(run: Run) -> None:
    if missing := [name for name in ("ray", "vllm") if find_spec(name) is None]:
        run.skip("demo", f"{' and '.join(missing)} not installed")
    elif not run.on_gpu:
        run.skip("demo", "needs a GPU; `make demo` runs it on a CPU")
    else:
        run.part("demo", train)


def train(run: Run) -> None:
    given = ["train", "deploy/configs/larger.toml", *SHARES, "--run", str(run.scratch / "demo")]
    command = [sys.executable, "-m", "deploy.cli", *given]
    started = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, "TMPDIR": "/tmp"}, capture_output=True, text=True, timeout=600)
    run.figure(f"demo: {time.perf_counter() - started:.0f} s; {' '.join(done.stdout.splitlines()[-1:])}")
    run.expect(done.returncode == 0, f"demo: it ends with {done.returncode} {done.stderr[-2000:]}")
