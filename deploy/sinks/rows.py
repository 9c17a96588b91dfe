"""The rows that a sink gets: the records of a run as plain numbers, in a fixed order. Runs in the driver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from common.files import read_record

SAMPLE_COLUMNS = ("step", "prompt", "response", "score", "tokens", "finish_reason")


@dataclass(frozen=True)
class Row:
    """The numbers of one step record or one evaluation.

    `place` orders all rows of a run: 2 n for the evaluation after n steps, 2 n + 1 for the record of step n. No two
    rows have the same place, even if the run is resumed.
    """

    place: int
    step: int  # number of the step; for an evaluation, the policy version
    time: float
    values: dict[str, float]

    @property
    def is_evaluation(self) -> bool:
        return self.place % 2 == 0


def step_row(record: Mapping[str, Any]) -> Row:
    """The row of a record of metrics.jsonl. Each health rule in it is a value of 1."""
    values = {key: float(value) for key, value in record.items() if _is_number(value) and key not in ("step", "time")}
    return Row(2 * record["step"] + 1, record["step"], record["time"], values | _events(record))


def evaluation_row(record: Mapping[str, Any]) -> Row:
    """The row of a record of evaluations.jsonl, of PPO or of reward training."""
    step = record["policy_version" if "policy_version" in record else "step"]
    groups = ("components", "judge_voids")
    parts = {f"{group}/{name}": value for group in groups for name, value in record.get(group, {}).items()}
    numbers = {key: value for key, value in {**record, **parts}.items() if _is_number(value)}
    for known in ("policy_version", "step", "time"):
        numbers.pop(known, None)
    values = {f"evaluation/{key}": float(value) for key, value in numbers.items()}
    return Row(2 * step, step, record["time"], values | _events(record))


class NewRows:
    """Reads the rows that a run has added to its directory since the last call."""

    def __init__(self, directory: Path) -> None:
        # In this order: the evaluation after n steps is written before the record of step n.
        self._files = [(directory / "metrics.jsonl", step_row), (directory / "evaluations.jsonl", evaluation_row)]
        self._read = [0, 0]  # bytes of each

    def read(self) -> list[Row]:
        rows: list[Row] = []
        for number, (path, row) in enumerate(self._files):
            if path.exists():
                with open(path, "rb") as file:
                    file.seek(self._read[number])
                    added = file.read()
                whole = added[: added.rfind(b"\n") + 1]  # the last line may still be being written
                self._read[number] += len(whole)
                records = (read_record(line) for line in whole.splitlines())
                rows += [row(record) for record in records if record is not None and _has_place(record)]
        return sorted(rows, key=lambda row: row.place)


def samples(directory: Path, step: int, count: int) -> list[tuple[Any, ...]]:
    """The first rollouts of a step in the journal, as values of SAMPLE_COLUMNS. Empty if it has no such step."""
    path = directory / f"journal/step-{step:06d}.arrow"
    if not path.exists():
        return []
    with pa.memory_map(str(path)) as source:
        table = pa.ipc.open_file(source).read_all().slice(0, count)
        texts = (table[name].to_pylist() for name in ("prompt", "response", "score"))
        tokens = [len(versions) for versions in table["policy_versions"]]
        reasons = table["finish_reason"].to_pylist()
    return [(step, *row) for row in zip(*texts, tokens, reasons, strict=True)]


def _has_place(record: Mapping[str, Any]) -> bool:
    """False for a record of which trackers cannot say when it was made, such as one with an infinite step."""
    step = record.get("policy_version", record.get("step"))
    return isinstance(step, int) and _is_number(record.get("time"))


def _events(record: Mapping[str, Any]) -> dict[str, float]:
    return {f"health/{rule}": 1.0 for rule in record.get("health", ())}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
