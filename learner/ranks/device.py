"""The device of a trainer rank, and how torch computes there. Runs in every trainer rank."""

from __future__ import annotations

import torch

from common.config.training import TrainerConfig
from common.model.files import find_device


def trainer_device(cfg: TrainerConfig, *, lent: float = 0.0) -> torch.device:
    """The rank's GPU, or the CPU. Sets this process's threads and torch's deterministic mode. `lent` is the share of
    the GPU that an engine lends to this rank. Raises the errors of `find_device`."""
    torch.set_num_threads(cfg.threads)
    torch.use_deterministic_algorithms(cfg.deterministic)
    return find_device(cfg.gpus + lent)
