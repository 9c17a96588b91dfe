"""Compares weights and learner state on disk, bit for bit. Runs in rank 0 of `ratchet audit --replay`.

A checkpoint is a set of files, one of each kind for each rank that wrote it. So two checkpoints of one state have the
same tensors. They have the same files only if the same number of ranks wrote them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from learner.proof.chain import Violation

RULE = "replay"


def check_same_state(written: Path, replayed: Path) -> None:
    """Raises Violation unless the checkpoint `written` has the numbers and tensors of `replayed`. If `written` has no
    optimizer state, that is not compared."""
    numbers = [json.loads((directory / "numbers.json").read_text()) for directory in (written, replayed)]
    if numbers[0] != numbers[1]:
        raise Violation(RULE, f"{written} has the numbers {numbers[0]}, the replay has {numbers[1]}")
    for kind in ("weights", "optimizer"):
        files = sorted(written.glob(f"{kind}-*.safetensors"))
        if kind == "weights" or files:
            _check(written, whole_tensors(files), whole_tensors(replayed.glob(f"{kind}-*.safetensors")))


def check_same_weights(policy: Path, replayed: Path) -> None:
    """Raises Violation unless two Hugging Face directories have the same weights."""
    _check(policy, *(whole_tensors(directory.glob("*.safetensors")) for directory in (policy, replayed)))


def _check(where: Path, written: dict[str, Tensor], replayed: dict[str, Tensor]) -> None:
    if written.keys() != replayed.keys():
        raise Violation(RULE, f"{where} has other tensors: {min(written.keys() ^ replayed.keys())}")
    for name, tensor in sorted(written.items()):
        again = replayed[name]
        if (tensor.dtype, tensor.shape) != (again.dtype, again.shape) or not _same_bits(tensor, again):
            raise Violation(RULE, f"{where}: {name} is not what the journal leads to")


def _same_bits(one: Tensor, other: Tensor) -> bool:
    as_bytes = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*as_bytes)


def whole_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """Every tensor in full. A share names its place in the whole tensor in the header of its file."""
    whole: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            places = json.loads((file.metadata() or {}).get("ratchet", "{}"))
            for name in file.keys():  # noqa: SIM118, it is no dictionary
                share = file.get_tensor(name)
                if name not in places:
                    whole[name] = share
                    continue
                place = places[name]
                target = whole.setdefault(name, torch.zeros(place["shape"], dtype=share.dtype))
                target[tuple(slice(o, o + n) for o, n in zip(place["offset"], share.shape, strict=True))] = share
    return whole
