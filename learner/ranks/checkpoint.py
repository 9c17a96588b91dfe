"""Learner state on disk: every rank writes its share of every tensor; any number of ranks read it.

Runs in every trainer rank, and in the process of `ratchet export`. The driver checks, counts and prunes checkpoints
(learner/loop/checkpoints.py), and writes the marker COMPLETE once every rank has written its files:

    numbers.json                    state other than tensors
    weights-00000.safetensors       rank 0's share of the weights that are trained
    optimizer-00000.safetensors     rank 0's share of Adam's moments

The header of a .safetensors file has, under the metadata key `ratchet`, the shape of each whole tensor and the place of
this share in it. Settings of the optimizer, such as learning rates, are not stored: they come from the config. Nothing
here is read with pickle, so a checkpoint can run no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from common.errors import UserError
from learner.loop.checkpoints import COMPLETE, CheckpointError, read_marker

_NUMBERS = "numbers.json"
# Frozen weights are left out: they are in the model that a run starts from.
_OPTIONS = StateDictOptions(ignore_frozen_params=True)
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}

Tensors = dict[str, Any]  # the values are tensors; torch's own type for such a dictionary allows more


def save_checkpoint(
    directory: Path, network: nn.Module, optimizer: Optimizer, numbers: dict[str, Any]
) -> dict[str, str]:
    """Writes weights, optimizer state and `numbers` (JSON, the same on every rank). Every rank must call it. Returns
    the SHA-256 of each file that this rank wrote, by name."""
    several = dist.is_initialized()
    rank = dist.get_rank() if several else 0
    if rank == 0:
        (directory / COMPLETE).unlink(missing_ok=True)  # first: a marker without its files would be wrong
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True, exist_ok=True)  # a file that another program has open on NFS stays
    if several:
        dist.barrier()
    if optimizer.state:
        weights, moments, _ = _state(network, optimizer)
    else:  # torch would create the first state by a step that Adam counts, so a save would change later weights
        weights, moments = _once(network, get_model_state_dict(network, options=_OPTIONS)), {}
    files = {
        name: _write(directory / name, partial(_write_tensors, tensors=tensors, first=rank == 0))
        for name, tensors in (
            (f"weights-{rank:05d}.safetensors", weights),
            (f"optimizer-{rank:05d}.safetensors", moments),
        )
    }
    if rank == 0:
        files[_NUMBERS] = _write(directory / _NUMBERS, lambda file: file.write(json.dumps(numbers).encode()))
    return files


def load_checkpoint(directory: Path, network: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Fills network and optimizer from a checkpoint that any number of ranks wrote, and returns its numbers.

    Every rank must call it. Raises UserError for one that cannot be read, or lacks a weight of this network. Network
    and optimizer may then hold some of its tensors.
    """
    weights, moments, optimizer_state = _state(network, optimizer)
    _read_tensors(directory, "weights", weights)
    unmoved = _read_tensors(directory, "optimizer", moments, some=True)
    options = StateDictOptions(strict=False)
    set_state_dict(network, optimizer, model_state_dict=weights, optim_state_dict=optimizer_state, options=options)
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if f"{name}.step" in unmoved:  # it had no gradient yet, so Adam has no state for it
            optimizer.state.pop(parameter, None)
    return _read_numbers(directory)


def load_network(directory: Path, network: nn.Module) -> dict[str, Any]:
    """Fills the network without the optimizer, in one process, and returns the numbers."""
    weights = _once(network, get_model_state_dict(network, options=_OPTIONS))
    _read_tensors(directory, "weights", weights)
    set_model_state_dict(network, weights, options=StateDictOptions(strict=False))
    return _read_numbers(directory)


def _state(network: nn.Module, optimizer: Optimizer) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """The tensors of network and optimizer by name, and the optimizer's state, which holds the latter."""
    optimizer.zero_grad(set_to_none=True)  # with gradients, torch would not give an optimizer its first state
    found: tuple[Any, Any] = get_state_dict(network, optimizer, options=_OPTIONS)
    model_state, optimizer_state = found
    moments = {
        f"{name}.{key}": value for name, state in optimizer_state["state"].items() for key, value in state.items()
    }
    return _once(network, model_state), moments, optimizer_state


def _once(network: nn.Module, state: Mapping[str, Any]) -> Tensors:
    """The state without second names of tied weights."""
    once = {name for name, _ in network.named_parameters()}
    second = {name for name, _ in network.named_parameters(remove_duplicate=False)} - once
    return {name: tensor for name, tensor in state.items() if name not in second}


# One rank's share of a tensor


@dataclass(frozen=True)
class _Share:
    """The values of a tensor that this rank holds, and their place in the whole tensor."""

    values: Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]  # of the whole tensor


def _share(tensor: Tensor) -> _Share:
    if not isinstance(tensor, DTensor):
        return _Share(tensor.detach(), (0,) * tensor.ndim, tuple(tensor.shape))
    [chunk] = tensor.__create_chunk_list__()
    return _Share(tensor.to_local().detach(), tuple(chunk.offsets), tuple(tensor.shape))


# Files


def _write(path: Path, write: Callable[[_Hashed], Any]) -> str:
    """Writes a file and syncs it to disk. Returns its SHA-256, computed from what was written."""
    with open(path, "wb") as file:
        hashed = _Hashed(file)
        write(hashed)
        file.flush()
        os.fsync(file.fileno())
    return hashed.digest.hexdigest()


class _Hashed:
    """Hashes a file while it is written, so that a byte that the disk changes later is detected."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> None:
        self.digest.update(data)
        self._file.write(data)


def _write_tensors(file: _Hashed, *, tensors: Mapping[str, Tensor], first: bool) -> None:
    """Writes this rank's shares in the format of safetensors, one tensor in memory at a time. Tensors that every rank
    holds in full are written by the `first` rank only."""
    shares = {name: _share(tensor) for name, tensor in tensors.items() if first or isinstance(tensor, DTensor)}
    shares = {name: share for name, share in shares.items() if share.values.numel()}
    places = {name: {"shape": share.shape, "offset": share.offset} for name, share in shares.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "ratchet": json.dumps(places)}}
    end = 0
    for name, share in shares.items():
        begin, end = end, end + share.values.nbytes
        dtype, shape = _DTYPES[share.values.dtype], list(share.values.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of 8
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for share in shares.values():
        file.write(share.values.cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _read_tensors(directory: Path, kind: str, tensors: Mapping[str, Tensor], *, some: bool = False) -> set[str]:
    """Fills this rank's share of every tensor, in place, from the shares in the files of this kind. With `some`, some
    tensors may be missing as a whole; returns their names."""
    wanted = {name: _share(tensor) for name, tensor in tensors.items()}
    missing = {name: share.values.numel() for name, share in wanted.items()}
    found: set[str] = set()
    try:
        for path in _files(directory, kind):
            with safe_open(path, "pt") as file:
                places = json.loads(file.metadata()["ratchet"])
                for name in wanted.keys() & set(file.keys()):
                    found.add(name)
                    missing[name] -= _copy(file, name, places[name], wanted[name])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise _unreadable(directory, f"{type(error).__name__}: {error}") from None
    if lacking := [name for name, values in missing.items() if values and (name in found or not some)]:
        raise _unreadable(directory, f"it does not have all of {lacking[0]}, which this network has")
    return wanted.keys() - found


def _copy(file: Any, name: str, place: Mapping[str, Any], share: _Share) -> int:
    """Copies those values of a written share that this rank holds. Returns their number. Raises ValueError if the
    tensor has another shape."""
    if tuple(place["shape"]) != share.shape:
        raise ValueError(f"a tensor of shape {place['shape']} cannot fill one of shape {list(share.shape)}")
    if not share.shape:
        share.values.copy_(file.get_tensor(name))
        return 1
    written, from_, to = file.get_slice(name), [], []
    for theirs, their_size, ours, our_size in zip(
        place["offset"], written.get_shape(), share.offset, share.values.shape, strict=True
    ):
        begin, end = max(theirs, ours), min(theirs + their_size, ours + our_size)
        if begin >= end:
            return 0
        from_.append(slice(begin - theirs, end - theirs))
        to.append(slice(begin - ours, end - ours))
    target = share.values[tuple(to)]
    target.copy_(written[tuple(from_)])
    return target.numel()


def _files(directory: Path, kind: str) -> Iterator[Path]:
    """The checkpoint's files of one kind. Files that its marker does not name are ignored."""
    names = _marker(directory)["files"]
    yield from (directory / name for name in names if name.startswith(f"{kind}-"))


def _read_numbers(directory: Path) -> dict[str, Any]:
    try:
        return json.loads((directory / _NUMBERS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(directory, f"{_NUMBERS}: {error}") from None


def _marker(directory: Path) -> dict[str, Any]:
    try:
        return read_marker(directory)
    except CheckpointError as error:
        raise _unreadable(directory, str(error)) from None


def _unreadable(directory: Path, reason: str) -> UserError:
    return UserError(f"checkpoint {directory} cannot be read ({' '.join(reason.split())})")
