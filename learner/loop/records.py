"""metrics.jsonl and evaluations.jsonl of a run that is resumed. Runs in the driver.

Both are derived: a line that is broken, or does not belong to the run's journal, is set aside and never stops a run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.files import read_record, read_records, write_durably
from learner.loop.batch_metrics import batch_metrics
from learner.loop.evaluation import Evaluation
from learner.loop.journal import Journal, JournalStep
from learner.loop.set_aside import set_lines_aside

Report = Callable[[str], None]
Record = dict[str, Any]


def keep_sound_records(path: Path, fault: Callable[[Record], str | None], report: Report) -> list[Record]:
    """The records of a file of JSON lines. Lines that are not JSON objects, or have a `fault`, are moved from the file
    to set-aside/ of its directory. A last line that a crash cut short is only removed."""
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    last = lines.pop()
    records: list[Record] = []
    sound: list[bytes] = []
    broken: dict[str, list[bytes]] = {}
    for line in [*lines, *([last] if read_record(last) is not None else [])]:
        record = read_record(line)
        reason = "not a JSON object" if record is None else fault(record)
        if record is None or reason is not None:
            broken.setdefault(reason or "", []).append(line)
        else:
            records.append(record)
            sound.append(line)
    for reason, found in broken.items():
        report(set_lines_aside(path.parent, path, found, reason))
    if broken or last:
        write_durably(path, "".join(line.decode() + "\n" for line in sound))
    return records


def sound_metrics(path: Path, journal: Journal, report: Report) -> set[int]:
    """The steps that have a record in metrics.jsonl, after its broken lines are set aside."""
    found: set[int] = set()

    def fault(record: Record) -> str | None:
        step = record.get("step")
        if type(step) is not int or not 0 <= step < journal.next_step:
            return "not the record of a step in the journal"
        if step in found:
            return "a second record of its step"
        found.add(step)
        return None

    keep_sound_records(path, fault, report)
    return found


def fill_gaps(path: Path, journal: Journal, logged: set[int]) -> bool:
    """Adds a record to metrics.jsonl for every step of the journal that has none, with the values that the journal has.
    Returns True if there were such steps."""
    missing = set(range(journal.next_step)) - logged
    if missing:
        records = [*read_records(path), *(record_of(journal.read(step), {}) for step in sorted(missing))]
        records.sort(key=lambda record: record["step"])
        write_durably(path, "".join(json.dumps(record) + "\n" for record in records))
        logged |= missing
    return bool(missing)


def record_of(entry: JournalStep, stats: dict[str, float]) -> Record:
    """The record of a step in metrics.jsonl, without values that only the driver that took the batch knew."""
    rollouts = batch_metrics(entry.table, entry.void_kinds, policy_version=entry.policy_version)
    return {"step": entry.step, "time": entry.time, **rollouts, **stats}


def sound_evaluations(path: Path, journal: Journal, report: Report) -> list[Evaluation]:
    """The evaluations of the run so far, oldest first. A record has, under `journal`, the hash of the newest entry that
    its version has learned from. Records of another journal, or of steps that were lost, are thus found and set
    aside."""
    found: list[int] = []

    def fault(record: Record) -> str | None:
        try:
            version = Evaluation.from_record(record).policy_version
        except (KeyError, TypeError, ValueError) as error:
            return f"not the record of an evaluation ({type(error).__name__}: {error})"
        known = type(version) is int and 0 <= version <= journal.next_step
        if not known or record.get("journal") != journal.digest(version):
            return "an evaluation of another journal"
        if version in found:
            return "a second evaluation of its version"
        found.append(version)
        return None

    return [Evaluation.from_record(record) for record in keep_sound_records(path, fault, report)]
