"""Checkpoints as an auditor reads them: every file is intact, and the checkpoint agrees with the journal.

Runs in `ratchet audit`. learner/loop/checkpoints.py describes the marker; this reader shares no code with it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learner.proof.chain import Note, Violation

RULE = "checkpoints"
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Found:
    """The checkpoints of a run."""

    complete: Mapping[int, Path]  # by step
    unfinished: int  # without a marker: a crash cut them short, and nothing reads them
    num_bytes: int


def check_checkpoints(directory: Path, digests: Sequence[str], notes: Sequence[Note]) -> Found:
    """Reads every checkpoint. `digests`: of the begin note, then of each step. Raises Violation."""
    complete, unfinished, num_bytes = {}, 0, 0
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match is None or path.is_symlink() or not path.is_dir() or path.name != f"step-{int(match[1]):06d}":
            continue
        if not (path / "COMPLETE").is_file():
            unfinished += 1
            continue
        step = int(match[1])
        num_bytes += _check(path, step, digests, notes)
        complete[step] = path
    return Found(dict(sorted(complete.items())), unfinished, num_bytes)


def _check(path: Path, step: int, digests: Sequence[str], notes: Sequence[Note]) -> int:
    """Returns the bytes of one checkpoint."""
    marker = _json(path / "COMPLETE")
    if marker.get("step") != step:
        raise Violation(RULE, f"{path} was written as step {marker.get('step')}")
    if step >= len(digests):
        raise Violation(RULE, f"{path} holds {step} steps, but the journal only {len(digests) - 1}")
    if marker.get("journal") != digests[step]:
        raise Violation(RULE, f"{path} does not follow step {step - 1} of this journal")
    skipped = sorted(note.about["step"] for note in notes if note.kind == "void" and note.about["step"] < step)
    if marker.get("voids") != skipped:
        raise Violation(RULE, f"{path} has skipped the batches {marker.get('voids')}; the journal says {skipped}")
    depends: dict[str, str] = {}
    for note in notes:
        if note.kind == "begin" or (note.kind == "accept" and note.before_step < step):
            depends |= note.about["identity"]
    if marker.get("identity") != depends:
        raise Violation(RULE, f"{path} was written with another model, other prompts or other reward sources")
    files = marker.get("files")
    if not isinstance(files, dict) or "numbers.json" not in files:
        raise Violation(RULE, f"{path}: its marker does not name its files")
    num_bytes = 0
    for name, digest in files.items():
        file = path / name
        if "/" in name or file.is_symlink() or not file.is_file():
            raise Violation(RULE, f"{file} is missing")
        num_bytes += file.stat().st_size
        with open(file, "rb") as opened:
            if (found := hashlib.file_digest(opened, "sha256").hexdigest()) != digest:
                raise Violation(RULE, f"{file} is damaged: its SHA-256 is {found}, the marker says {digest}")
    if (numbers := _json(path / "numbers.json")).get("step") != step:
        raise Violation(RULE, f"{path}: its numbers are those of step {numbers.get('step')}")
    return num_bytes


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise Violation(RULE, f"{path} cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise Violation(RULE, f"{path} is not a JSON object")
    return value
