"""Checks a run that has ended after kills. Runs in the harness.

Derived from the files alone, with pyarrow and hashlib. `ratchet audit RUN --replay` then proves the same again, and
the weights, with the product's own code.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tests.chaos.scenarios import ROOT

STEP = re.compile(r"step-(\d{6,})\.arrow")
NOTE = re.compile(r"note-(\d{6,})-(\d{3,})\.json")
# Files of a crash that nothing has removed when the run is over.
LEFTOVERS = ("*.tmp", ".policy-*", "journal/*.tmp", "checkpoints/*.tmp", ".adapter-*")


@dataclass
class Findings:
    """The findings in one run directory."""

    steps: int = 0
    samples: int = 0
    voids: int = 0
    lost: int = 0  # sample ids that were settled, and are neither in the journal nor void
    trained_twice: int = 0
    faults: list[str] = field(default_factory=list)


def entries(run: Path) -> list[tuple[tuple[int, int, int], Path]]:
    """The chain in its order: the notes before a step, then the step."""
    found = []
    for path in (run / "journal").iterdir():
        if match := STEP.fullmatch(path.name):
            found.append(((int(match[1]), 1, 0), path))
        elif match := NOTE.fullmatch(path.name):
            found.append(((int(match[1]), 0, int(match[2])), path))
    return sorted(found)


def examine(run: Path, *, seed: int, num_prompts: int, max_staleness: int) -> Findings:
    """Reads the whole journal and reports every rule that is broken."""
    findings = Findings()
    previous, trained, voided, prompts = "", Counter[str](), set[str](), dict[str, Any]()
    batches: dict[int, list[str]] = {}
    for (number, _, _), path in entries(run):
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        written = path.with_suffix(".sha256").read_text(encoding="ascii").split()[0]
        table, metadata = _read(path, content)
        if digest != written or metadata["previous"] != previous:
            findings.faults.append(f"{path.name} is not the next link of the chain")
        previous = digest
        if table is None:
            voided_here = batches.pop(metadata["step"], []) if metadata["kind"] == "void" else []
            trained.subtract(voided_here)
            voided.update(voided_here)
            continue
        if number != findings.steps:
            findings.faults.append(f"{path.name} follows step {findings.steps - 1}")
        findings.steps += 1
        batches[number] = ids = list(_ids(table))
        trained.update(ids)
        voided.update(sample for sample, *_ in metadata["voids"])
        prompts = metadata["prompts"]
        versions = {version for row in table["policy_versions"].to_pylist() for version in row}
        if versions and not (number - max_staleness <= min(versions) and max(versions) <= number):
            findings.faults.append(f"{path.name} has tokens of versions {min(versions)} to {max(versions)}")
    trained = +trained
    findings.samples, findings.voids = len(trained), len(voided)
    findings.trained_twice = sum(count > 1 for count in trained.values())
    if prompts:
        settled = _settled(prompts, seed=seed, num_prompts=num_prompts)
        missing = settled - set(trained) - voided
        findings.lost = len(missing)
        if findings.lost:
            findings.faults.append(f"lost: {sorted(missing)[:5]}")
    if findings.trained_twice:
        findings.faults.append(f"trained twice: {[sample for sample, count in trained.items() if count > 1][:5]}")
    findings.faults += [f"{path} was left behind" for pattern in LEFTOVERS for path in run.glob(pattern)]
    return findings


def _read(path: Path, content: bytes) -> tuple[pa.Table | None, dict[str, Any]]:
    if path.suffix == ".json":
        return None, json.loads(content)
    table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
    return table, json.loads(table.schema.metadata[b"ratchet"])


def _ids(table: pa.Table) -> Iterator[str]:
    for row in zip(*(table[key].to_pylist() for key in ("epoch", "prompt_index", "replica")), strict=True):
        yield "/".join(map(str, row))


def _settled(prompts: dict[str, Any], *, seed: int, num_prompts: int) -> set[str]:
    """The sample ids that are issued and not outstanding, one replica of each prompt: number n is the n-th prompt in
    the seeded orders of the epochs, one after another."""
    outstanding = {number for first, end in prompts["outstanding"] for number in range(first, end)}
    orders: dict[int, np.ndarray] = {}
    settled = set()
    for number in range(prompts["issued"]):
        epoch, place = divmod(number, num_prompts)
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(num_prompts)
        if number not in outstanding:
            settled.add(f"{epoch}/{orders[epoch][place]}/0")
    return settled


def replayed(run: Path, environment: dict[str, str]) -> list[str]:
    """The fault that `ratchet audit RUN --replay` finds."""
    command = [sys.executable, "-m", "deploy.cli", "audit", str(run), "--replay"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    return [] if done.returncode == 0 else [f"ratchet audit --replay: {done.stdout[-500:]}{done.stderr[-500:]}"]


def unequal(run: Path, undisturbed: Path) -> list[str]:
    """The first difference to an undisturbed run of a synchronous config: in a batch, or in the final weights."""
    for (number, _, _), path in entries(run):
        if path.suffix == ".arrow":
            one, other = (_read(p, p.read_bytes())[0] for p in (path, undisturbed / "journal" / path.name))
            assert one is not None
            assert other is not None
            if not one.drop_columns("generator").equals(other.drop_columns("generator")):
                return [f"step {number} has other rows than the undisturbed run"]
    if not (run / "policy").exists():
        return ["the run has no policy"]
    weights = [(directory / "policy/model.safetensors").read_bytes() for directory in (run, undisturbed)]
    return [] if weights[0] == weights[1] else ["the final weights differ from the undisturbed run's"]
