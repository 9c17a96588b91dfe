"""`python -m tests.gpu_check`: checks and measures on a GPU the code that needs neither Ray nor vLLM, and where
they are installed also vLLM's engine and a whole run.

One line a result: PASS, FAIL, SKIP with its reason, or a figure. Exits with 1 if a check failed. Nothing is downloaded:
the models have random weights. With `--device cpu` it runs the checks that make sense there.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

from common.model import compiled_layers
from tests.gpu_check import (
    attention,
    demo,
    engine,
    head,
    kernels,
    learner,
    publication,
    ranks,
    services,
    sharded,
    speed,
)
from tests.gpu_check.older_torch import adapt
from tests.gpu_check.run import Run

CHECKS: dict[str, Callable[[Run], None]] = {
    "attention": attention.check,
    "head": head.check,
    "kernels": kernels.check,
    "learner": learner.check,
    "services": services.check,
    "sharded": sharded.check,
    "publication": publication.check,
    "ranks": ranks.check,
    "engine": engine.check,
    "speed": speed.check,
    "demo": demo.check,
}


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for torch's deterministic mode; read by CUDA's start
    device = torch.device(options.device)
    if device.type == "cpu":
        compiled_layers.BACKEND = "eager"  # which only traces: torch's compiler takes half a minute for each graph
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no GPU; use --device cpu for the checks that run without one")
    with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=options.scratch) as scratch:
        run = Run(device, Path(scratch), options.big, options.limit_s)
        run.figure(f"{hardware(device)}; Python {sys.version.split()[0]}, transformers {transformers.__version__}")
        adapt(run)
        for name in options.only.split(","):
            started = time.perf_counter()
            run.part(name, CHECKS[name])
            run.figure(f"{name}: {time.perf_counter() - started:.1f} s")
    print(f"{len(run.failures)} failed" if run.failures else "none failed", flush=True)
    return 1 if run.failures else 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_check", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--only", default=",".join(CHECKS), help="checks to run, with commas between them")
    parser.add_argument("--big", action="store_true", help="also models of 1B and 7B; needs a GPU of 80 GB")
    parser.add_argument("--limit-s", type=float, default=600, help="skip parts that have not begun by then")
    parser.add_argument("--scratch", help="directory for models and checkpoints; default: the system's own")
    options = parser.parse_args(arguments)
    if unknown := set(options.only.split(",")) - set(CHECKS):
        parser.error(f"no such check: {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}")
    return options


def hardware(device: torch.device) -> str:
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    major, minor = torch.cuda.get_device_capability()
    total = torch.cuda.get_device_properties(0).total_memory / 2**30
    name = f"{torch.cuda.get_device_name()} of {total:.0f} GiB, capability {major}.{minor}"
    return f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
