"""One run of the checks: the device, and a line of output for each result."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass
class Run:
    """What the checks are told, and what they found."""

    device: torch.device
    scratch: Path  # for models and checkpoints
    big: bool = False  # also measure models that need a GPU of 80 GB and some minutes
    limit_s: float = 600  # parts that have not begun by then are skipped
    failures: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def gpus(self) -> int:
        """The value of a section's `gpus` that puts its role on this device."""
        return 1 if self.on_gpu else 0

    def expect(self, ok: bool, what: str) -> None:
        """PASS or FAIL."""
        print("PASS" if ok else "FAIL", what, flush=True)
        if not ok:
            self.failures.append(what)

    def figure(self, what: str) -> None:
        """A number that somebody has to judge."""
        print("    ", what, flush=True)

    def skip(self, what: str, why: str) -> None:
        print("SKIP", f"{what}: {why}", flush=True)

    def part(self, name: str, work: Callable[..., None], *args: Any, **options: Any) -> None:
        """Calls work(self, *args). An error fails this part, and the run continues."""
        if time.perf_counter() - self.started > self.limit_s:
            self.skip(name, f"the {self.limit_s:g} s of --limit-s are over")
            return
        try:
            work(self, *args, **options)
        except Exception as failure:
            traceback.print_exc()
            self.expect(False, f"{name}: {type(failure).__name__}: {failure}")

    def wait(self) -> None:
        """Returns when the device has done all work."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def milliseconds(self, work: Callable[[], Any], rounds: int = 10, warm_up: int = 3) -> float:
        """Median of several calls, until the device has done the work."""
        for _ in range(warm_up):
            work()
        laps = []
        for _ in range(rounds):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            laps.append(1e3 * (time.perf_counter() - started))
        return statistics.median(laps)

    def seconds(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds of one call until the device has done the work, and the call's result."""
        self.wait()
        started = time.perf_counter()
        result = work()
        self.wait()
        return time.perf_counter() - started, result


def error(found: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of the exact values."""
    exact = exact.detach().double()
    return float((found.detach().double() - exact).norm() / exact.norm().clamp_min(1e-30))
