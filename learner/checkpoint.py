"""Learner state on disk: written aside, synced, marked complete last."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

_MARKER = "COMPLETE"


def save_checkpoint(directory: Path, state: dict[str, Any]) -> None:
    """A directory without its marker is one that a crash cut short; it is never loaded."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    with open(directory / "learner.pt", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    (directory / _MARKER).touch()


def load_checkpoint(directory: Path) -> dict[str, Any]:
    return torch.load(directory / "learner.pt", map_location="cpu", weights_only=True, mmap=True)


class Checkpoints:
    """The checkpoints of a run: RUN/checkpoints/step-000100 holds the learner after 100 updates."""

    def __init__(self, directory: Path, *, every: int, keep: int) -> None:
        self._directory = directory
        self._every = every
        self._keep = keep

    def due(self, step: int, num_steps: int) -> bool:
        return step % self._every == 0 or step == num_steps

    def path(self, step: int) -> Path:
        return self._directory / f"step-{step:06d}"

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        complete = sorted(marker.parent for marker in self._directory.glob(f"step-*/{_MARKER}"))
        return complete[-1] if complete else None

    def prune(self) -> None:
        """Removes all but the newest `keep` complete checkpoints, and leftovers of a crash."""
        complete = sorted(marker.parent for marker in self._directory.glob(f"step-*/{_MARKER}"))
        for directory in self._directory.glob("step-*"):
            if directory not in complete[-self._keep :]:
                shutil.rmtree(directory)
