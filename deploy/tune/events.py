"""DIR/events.jsonl: what happened in a tuning, one event per line, and the state that follows. Runs in the driver.

A line is written before the tuning reacts to it. So a tuning that was killed at any moment continues from this file.
Runs that have ended are not repeated. Decisions about the others are computed again from the same results.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

from common.errors import UserError
from common.files import append_record, read_records
from deploy.tune.halving import Halving

EVENTS = "events.jsonl"
COMPLETE = "complete"  # it has done all of its steps
STOPPED_BY_ASHA = "asha"
STOPPED_BY_HEALTH = "health"
FAILED = "failed"  # it ended with an error twice, and does not continue
CUT = "cut"  # it continues: the tuning ended, or the run has failed for the first time
_NUMBER = (int, float)
# The fields of each event and their types, next to the event's name and time.
_FIELDS: dict[str, dict[str, Any]] = {
    "start": {"hours": _NUMBER},
    "result": {"run": str, "step": int, "value": _NUMBER},
    "stop": {"run": str, "outcome": str, "why": str},
    "again": {"run": str},
    "end": {"run": str, "outcome": str, "seconds": _NUMBER, "why": str},
}
BROKEN = (STOPPED_BY_HEALTH, FAILED)  # at later steps, these trials count with the worst outcome
_SHOWN = 80  # characters of a line in messages


@dataclass
class RunState:
    """One run of the tuning: a trial, or a finalist with another seed."""

    results: dict[int, float] = field(default_factory=dict)  # value of the metric by step
    outcome: str | None = None
    why: str = ""  # the reason of a stop or a failure
    seconds: float = 0.0
    continues_as_finalist: bool = False  # ASHA had stopped it, but it is a finalist
    failures: int = 0  # how often it has failed

    @property
    def last(self) -> tuple[int, float] | None:
        """Step and value of the newest evaluation."""
        return max(self.results.items()) if self.results else None


class Events:
    """Reads and extends the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._runs: dict[str, RunState] = {}
        self._order: list[tuple[str, int, float]] = []
        self.hours: float | None = None  # the hours given to the newest start of the command
        self._starts: list[list[float]] = []  # times of the first and the newest event of each start of the command
        self._started_here = False
        self.failed_in_a_row: list[str] = []  # runs that failed for the first time since the newest evaluation or start
        for record in read_records(path):
            if not (_is_event(record) and (self._starts or record["event"] == "start")):
                line = shorten(json.dumps(record), _SHOWN, placeholder="...")
                raise UserError(f"{path} has a line that ratchet tune has not written ({line}); restore the file")
            self._take(record)

    def start(self, hours: float) -> None:
        """The command starts or continues. `hours`: the time for all of its starts together."""
        self._add({"event": "start", "hours": hours})
        self._started_here = True

    def result(self, run: str, step: int, value: float) -> None:
        """An evaluation of a run."""
        self._add({"event": "result", "run": run, "step": step, "value": value})

    def stop(self, run: str, outcome: str, why: str) -> None:
        """The run is stopped for this reason, and does not continue."""
        self._add({"event": "stop", "run": run, "outcome": outcome, "why": why})

    def continue_as_finalist(self, run: str) -> None:
        """A run that ASHA has stopped continues, because it is a finalist."""
        self._add({"event": "again", "run": run})

    def end(self, run: str, outcome: str, seconds: float, why: str = "") -> None:
        """The process of a run has ended. With the outcome CUT and a reason it has failed, and is tried once more."""
        self._add({"event": "end", "run": run, "outcome": outcome, "seconds": round(seconds, 1), "why": why})

    def run(self, name: str) -> RunState:
        return self._runs.setdefault(name, RunState())

    def results(self) -> Iterator[tuple[str, int, float]]:
        """All results, oldest first."""
        return iter(self._order)

    def halving(self, rungs: tuple[int, ...], trials: set[str]) -> Halving:
        """ASHA with the results of all trials so far."""
        return Halving(rungs, (result for result in self._order if result[0] in trials))

    @property
    def seconds(self) -> float:
        """Working time of all starts of the command together. A start that was killed counts until its last event."""
        if not self._started_here:
            return sum(newest - first for first, newest in self._starts)
        *earlier, (began, _) = self._starts
        return sum(newest - first for first, newest in earlier) + time.time() - began

    def _add(self, event: dict[str, Any]) -> None:
        record = {"time": time.time(), **event}
        append_record(self._path, record)
        self._take(record)

    def _take(self, record: dict[str, Any]) -> None:
        kind, now = record["event"], float(record["time"])
        if kind == "start":
            self._starts.append([now, now])
            self.failed_in_a_row.clear()
            self.hours = record["hours"]
            return
        self._starts[-1][1] = now
        state, name = self.run(record["run"]), record["run"]
        if kind == "result" and record["step"] not in state.results:
            state.results[record["step"]] = record["value"]
            self._order.append((name, record["step"], record["value"]))
            self.failed_in_a_row.clear()
        elif kind == "stop":
            state.outcome, state.why = record["outcome"], record["why"]
        elif kind == "again":
            state.outcome, state.why, state.continues_as_finalist = None, "", True
        elif kind == "end":
            state.seconds += record["seconds"]
            if record["outcome"] == CUT and record["why"]:
                state.failures, state.why = state.failures + 1, record["why"]
                self.failed_in_a_row.append(name)
            elif record["outcome"] in (COMPLETE, FAILED):
                state.outcome, state.why = record["outcome"], record["why"]


def _is_event(record: dict[str, Any]) -> bool:
    """True if the record has the fields of an event with their types."""
    name = record.get("event")
    fields = _FIELDS.get(name) if isinstance(name, str) else None
    return fields is not None and all(
        isinstance(record.get(key), kind) for key, kind in {"time": _NUMBER, **fields}.items()
    )
