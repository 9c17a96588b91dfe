"""`python -m tests.digest RUN`: hashes of what a run learned, to compare two versions of the code.

Two runs of one config and one seed on one machine print the same lines if no change touched the numbers: every
rollout, score and log-probability of the journal, every metric, every held-out evaluation, and the final weights.
Times are left out, health rules, some of which look at times, and the bytes of weights sent, which depend on the number
of replicas. Each line's hash covers all
lines above it. So the first line that differs says where two runs part, and the last line is the digest of the run.

Use a config with max_staleness = 0 and one generator. Otherwise the clock decides which weights sample a token.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from common.files import read_records
from learner.loop.journal import Journal

UNREPEATABLE_KEYS = {"time", "journal", "health", "staleness/generating_s", "staleness/buffered_s"}
UNREPEATABLE_PATHS = ("time/", "wait/", "weights/", "environment/step_s/")


def digests(run: Path) -> Iterator[tuple[str, str]]:
    """Names of the run's parts in order, each with a hash of all parts so far. The last one covers the whole run."""
    whole = hashlib.sha256()
    for name, part in _parts(run):
        whole.update(part)
        yield name, whole.hexdigest()[:16]


def _parts(run: Path) -> Iterator[tuple[str, bytes]]:
    for step in Journal(run / "journal").since(0):
        kept = [step.policy_version, step.prompts, step.voids, step.table.to_pylist()]  # no time, no hash of a file
        yield f"step {step.step}", _bytes(kept)
    yield "curve", _bytes([_repeatable(record) for record in read_records(run / "metrics.jsonl")])
    yield "evaluations", _bytes([_repeatable(record) for record in read_records(run / "evaluations.jsonl")])
    yield "policy", b"".join(_weights(run / "policy"))


def _repeatable(record: dict[str, Any]) -> dict[str, Any]:
    """The record without what a second run of the same code changes."""
    return {
        key: value
        for key, value in record.items()
        if key not in UNREPEATABLE_KEYS and not key.startswith(UNREPEATABLE_PATHS)
    }


def _weights(policy: Path) -> Iterator[bytes]:
    """Name, type, shape and bytes of every tensor, however they are divided among files."""
    files = {name: file for file in policy.glob("*.safetensors") for name in safe_open(file, "pt").keys()}  # noqa: SIM118
    for name in sorted(files):
        with safe_open(files[name], "pt") as tensors:
            tensor = tensors.get_tensor(name)
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        yield hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).digest()


def _bytes(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "journal").is_dir():
        sys.exit("usage: python -m tests.digest RUN (a run directory)")
    for name, digest in digests(Path(sys.argv[1])):
        print(f"{digest}  {name}")
