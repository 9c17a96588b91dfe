"""Checks metrics and evaluations against the journal. Runs in `ratchet audit`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from learner.loop.batch_metrics import batch_metrics
from learner.proof.chain import Step, Violation


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines. The last line may be cut short by a crash; any other must be a record."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise Violation(path.name, f"line {number} is not a record; it is repaired when the run continues")
        records.append(record)
    return records


class Metrics:
    """Compares each record of metrics.jsonl with its batch."""

    rule = "metrics"

    def __init__(self, path: Path | None) -> None:
        """None: the run has no records of steps."""
        self.records: dict[int, dict[str, Any]] = {}
        for record in read_lines(path) if path is not None else ():
            if self.records.setdefault(step := record.get("step", -1), record) is not record:
                raise Violation(self.rule, f"{path} has step {step} twice")
        self.missing: list[int] = []
        self.values = 0  # compared

    def take(self, step: Step) -> None:
        """Raises Violation."""
        if (record := self.records.get(step.number)) is None:
            self.missing.append(step.number)
            return
        void_kinds = [kind for *_, kind in step.about["voids"]]
        expected = batch_metrics(step.table, void_kinds, policy_version=step.about["policy_version"])
        for key, value in expected.items():
            if not same(record.get(key), value):
                raise Violation(self.rule, f"step {step.number}: {key} is {record.get(key)}, the journal says {value}")
        self.values += len(expected)

    def finish(self, num_steps: int, saved: int) -> None:
        """Raises Violation for records of steps that do not exist, and for missing records of steps before the newest
        checkpoint, which is after `saved` steps. A record of a later step may be missing: it is written when the run
        continues."""
        if surplus := sorted(step for step in self.records if step not in range(num_steps)):
            raise Violation(self.rule, f"metrics.jsonl has step {surplus[0]}, the journal has {num_steps} steps")
        if lost := [step for step in self.missing if step < saved]:
            raise Violation(self.rule, f"metrics.jsonl lacks step {lost[0]}, which a checkpoint contains")

    def check_update(self, step: int, stats: Mapping[str, float]) -> None:
        """Compares the learner's own metrics of a step with those of its replay. Raises Violation."""
        record = self.records.get(step, {})
        for key in stats.keys() & record.keys():
            if not key.startswith("time/") and not same(record[key], stats[key]):
                raise Violation(
                    "replay",
                    f"step {step}: {key} was {record[key]} in the run, and is {stats[key]} in the replay. Bits agree "
                    "only with the run's machine type, learner.ranks, learner.threads and micro-batches",
                )


def check_evaluations(run: Path, digests: Sequence[str]) -> list[dict[str, Any]]:
    """The records of evaluations.jsonl. Each must have the hash of the newest journal entry that its version has
    learned from, and agree with its answers. Raises Violation."""
    records, seen = read_lines(run / "evaluations.jsonl"), set()
    for record in records:
        version = record.get("policy_version")
        if not isinstance(version, int) or version in seen or not 0 <= version < len(digests):
            raise Violation("evaluations", f"version {version} is in evaluations.jsonl twice, or not in the journal")
        seen.add(version)
        if record.get("journal") != digests[version]:
            raise Violation("evaluations", f"version {version} does not belong to this run's journal")
        answers = run / f"answers/version-{version:06d}.jsonl"
        if answers.exists():
            _check_answers(record, answers)
    return records


def _check_answers(record: Mapping[str, Any], path: Path) -> None:
    answers = read_lines(path)
    scores = [answer["score"] for answer in answers if "void" not in answer]
    mean = sum(scores) / max(1, len(scores))
    found = (record["prompts"], record["voids"], record["score"])
    if found != (len(answers), len(answers) - len(scores), mean):
        raise Violation(
            "evaluations",
            f"version {record['policy_version']} has prompts, voids and mean score {found}; {path.name} has "
            f"{(len(answers), len(answers) - len(scores), mean)}",
        )


def same(one: Any, other: Any) -> bool:
    """True for equal numbers, and for two NaN."""
    both_nan = isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other)
    return both_nan or one == other
