"""Learner state on disk: every rank writes its share, and a marker is written last.

Runs in every trainer rank, and in the process of `ratchet export`. The driver counts and prunes checkpoints with
learner/loop/checkpoints.py.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from common.errors import UserError
from learner.loop.checkpoints import COMPLETE

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # with one rank that is intended

_NUMBERS = "numbers.json"
# Frozen weights are left out: they are in the model that a run starts from.
_OPTIONS = StateDictOptions(ignore_frozen_params=True)


def save_checkpoint(directory: Path, network: nn.Module, optimizer: Optimizer, numbers: dict[str, Any]) -> None:
    """Writes weights, optimizer state and `numbers` (JSON, the same on every rank). Every rank must call it.

    A directory without its marker was cut short by a crash, and is never loaded.
    """
    alone = not dist.is_initialized()
    first = alone or dist.get_rank() == 0
    if first:
        (directory / COMPLETE).unlink(missing_ok=True)  # first: a marker without its files would be wrong
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    if not alone:
        dist.barrier()
    model_state, optimizer_state = get_state_dict(network, optimizer, options=_OPTIONS)
    state = {"network": model_state, "optimizer": optimizer_state}
    try:
        dcp.save(state, checkpoint_id=directory, no_dist=alone)  # returns once the files of all ranks are synced
    except CheckpointException as error:  # not an Exception: in an actor it would end the process
        raise _explained(error, directory) from None
    if first:
        with open(directory / _NUMBERS, "w", encoding="utf-8") as file:
            json.dump(numbers, file)
            file.flush()
            os.fsync(file.fileno())
        (directory / COMPLETE).touch()


def _explained(error: CheckpointException, directory: Path) -> Exception:
    """The error of the first rank that failed. For a file cut short by a full disk torch says "unexpected pos"."""
    cause = next(failure for failure, _ in error.failures.values())
    if isinstance(cause, OSError):
        return cause
    if "unexpected pos" in str(cause):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))
    return RuntimeError(f"the checkpoint {directory} cannot be written: {cause}")


def load_checkpoint(directory: Path, network: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Fills network and optimizer from a checkpoint that any number of ranks wrote, and returns its numbers.

    Every rank must call it. Raises UserError for one that is damaged, or lacks a weight of this network. A checkpoint
    is trusted like code: torch reads its index with pickle.
    """
    model_state, optimizer_state = get_state_dict(network, optimizer, options=_OPTIONS)
    state: dict[str, Any] = {"network": model_state, "optimizer": optimizer_state}
    try:
        dcp.load(state, checkpoint_id=directory, no_dist=not dist.is_initialized())
    except CheckpointException as error:  # not an Exception: in an actor it would end the process
        cause = next(failure for failure, _ in error.failures.values())
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise UserError(
            f"checkpoint {directory} cannot be read ({reason}); restore it, or remove it: the run then continues from "
            "an older one and its journal"
        ) from None
    set_state_dict(
        network,
        optimizer,
        model_state_dict=state["network"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=False),
    )
    return json.loads((directory / _NUMBERS).read_text(encoding="utf-8"))


def load_network(directory: Path, network: nn.Module) -> dict[str, Any]:
    """Fills the network without the optimizer, in one process, and returns the numbers."""
    state = {"network": get_model_state_dict(network, options=_OPTIONS)}
    dcp.load(state, checkpoint_id=directory, no_dist=True)
    set_model_state_dict(network, state["network"], options=StateDictOptions(strict=False))
    return json.loads((directory / _NUMBERS).read_text(encoding="utf-8"))
