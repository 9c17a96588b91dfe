"""Runs cases by target and seed. A failure says how to run its case again."""

from __future__ import annotations

import importlib
import shutil
import traceback
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

TARGETS = ("config", "prompts", "preferences", "replies", "models")


@dataclass(frozen=True)
class Failure:
    target: str
    seed: int
    error: str  # the traceback

    def __str__(self) -> str:
        return f"{self.error.rstrip()}\nagain with: python -m tests.fuzz {self.target}:{self.seed}"


class Fuzzer:
    """Runs cases of one target in a directory of its own."""

    def __init__(self, target: str, directory: Path) -> None:
        self.target = target
        self._directory = directory / target
        (self._directory / "shared").mkdir(parents=True)
        self._module = importlib.import_module(f"tests.fuzz.{target}")
        self._shared: Any = self._module.prepare(self._directory / "shared")

    def run(self, seed: int) -> Failure | None:
        scratch = self._directory / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            self._module.case(Random(f"{self.target}:{seed}"), self._shared, scratch)
        except KeyboardInterrupt:
            raise
        except BaseException:  # SystemExit and other BaseExceptions are failures too
            return Failure(self.target, seed, traceback.format_exc())
        return None

    def close(self) -> None:
        if (close := getattr(self._module, "close", None)) is not None:
            close(self._shared)
