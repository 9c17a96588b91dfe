"""Checkpoints of a trainer without a driver: what the driver would do for one."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from learner.loop.checkpoints import write_marker
from learner.ranks.trainer import Trainer


def save_checkpoint_of(trainer: Trainer, directory: Path) -> None:
    """Saves a checkpoint with its marker. Every rank must call it."""
    files = trainer.save(directory)
    if dist.is_initialized():
        parts: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, files)
        assert len({name for part in parts for name in part}) == sum(map(len, parts))
        files = {name: digest for part in parts for name, digest in part.items()}
        if dist.get_rank() > 0:
            return
    mark(directory, files, trainer.step)


def mark(directory: Path, files: dict[str, str], step: int = 1) -> None:
    """Writes the marker of a checkpoint that belongs to no journal."""
    write_marker(directory, {"step": step, "journal": None, "voids": [], "identity": {}, "files": files})
