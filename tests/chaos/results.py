"""The results of the kills: records, runs/chaos.json, and the printed table. Runs in the harness."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.audit import Findings
from tests.chaos.scenarios import Blow


@dataclass
class Kill:
    """The result of one kill. Times are in seconds; None: the run was over before, or the next blow came first."""

    target: str
    how: str
    point: str
    at_step: int
    reached: bool = True  # a process was at the point
    next_step_s: float | None = None  # until the next step was on disk
    # Until the first step was on disk that is certain to need the killed process: the next one may have been complete.
    recovery_s: float | None = None

    @property
    def role(self) -> str:
        return Blow(self.target, self.how).role


@dataclass
class Outcome:
    """The events of one run."""

    kills: list[Kill] = field(default_factory=list)
    hangs: int = 0
    interventions: int = 0
    faults: list[str] = field(default_factory=list)


def summarise(
    outcomes: Sequence[Outcome], findings: Sequence[Findings], *, seed: int, skipped: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The content of runs/chaos.json. Seconds are given by role, as {count, min, median, max}. `skipped`: scenarios
    that were not run, with the reason."""
    kills = [kill for outcome in outcomes for kill in outcome.kills]
    return {
        "kills": len(kills),
        "lost": sum(found.lost for found in findings),
        "trained_twice": sum(found.trained_twice for found in findings),
        "hangs": sum(outcome.hangs for outcome in outcomes),
        "interventions": sum(outcome.interventions for outcome in outcomes),
        "recovery_s": _by_role(kills, "recovery_s"),
        "next_step_s": _by_role(kills, "next_step_s"),
        "faults": [fault for part in (*outcomes, *findings) for fault in part.faults],
        "points": _count(kill.point for kill in kills if kill.point and kill.reached),
        "points_missed": _count(kill.point for kill in kills if not kill.reached),
        "runs": len(outcomes),
        "steps": sum(found.steps for found in findings),
        "samples": sum(found.samples for found in findings),
        "voids": sum(found.voids for found in findings),
        "skipped": dict(skipped or {}),
        "seed": seed,
        "cores": len(os.sched_getaffinity(0)),
    }


def _by_role(kills: Sequence[Kill], what: str) -> dict[str, dict[str, float]]:
    seconds: dict[str, list[float]] = {}
    for kill in kills:
        if (value := getattr(kill, what)) is not None:
            seconds.setdefault(kill.role, []).append(value)
    return {
        role: {
            "count": len(values),
            "min": round(min(values), 2),
            "median": round(statistics.median(values), 2),
            "max": round(max(values), 2),
        }
        for role, values in sorted(seconds.items())
    }


def _count(names: Any) -> dict[str, int]:
    counted: dict[str, int] = {}
    for name in names:
        counted[name] = counted.get(name, 0) + 1
    return dict(sorted(counted.items()))


def holds(summary: dict[str, Any]) -> bool:
    """True if nothing was lost, trained twice or left hanging, nobody had to help, and every audit held."""
    return not any(summary[key] for key in ("lost", "trained_twice", "hangs", "interventions", "faults"))


def write(path: Path, summary: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def table(summary: dict[str, Any]) -> str:
    """The counts, then one line for each role."""
    counts = ", ".join(f"{key} {summary[key]}" for key in ("kills", "lost", "trained_twice", "hangs", "interventions"))
    lines = [counts, f"{'seconds until recovered':32}{'n':>5}{'min':>8}{'median':>8}{'max':>8}"]
    for role, row in summary["recovery_s"].items():
        lines.append(f"{role:32}{row['count']:5}{row['min']:8.1f}{row['median']:8.1f}{row['max']:8.1f}")
    return "\n".join([*lines, *(f"fault: {fault}" for fault in summary["faults"])])
