"""The result of a benchmark module, and the table and file that `make bench` makes of all results.

Every module of this package has `measure() -> dict[str, Result]`, which `python -m tests.bench` calls in a fresh
process. The keys are the measurements' names, and those of runs/bench.json.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

COMPARISONS = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Result:
    """One ratio, what it should be, and the numbers behind it."""

    value: float
    wanted: str = ""  # such as ">= 0.9"; empty: nothing is asked of it
    parts: Mapping[str, float] = field(default_factory=dict)  # units are in the names

    @property
    def met(self) -> bool:
        if not self.wanted:
            return True
        comparison, bound = self.wanted.split()
        return COMPARISONS[comparison](self.value, float(bound))


def write_results(path: Path, results: Mapping[str, Result]) -> None:
    """Beside what other modules measured before."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = old | {name: asdict(result) for name, result in results.items()}
    path.write_text(json.dumps(merged, indent=2) + "\n", encoding="utf-8")


def table(results: Mapping[str, Result]) -> str:
    """One line a measurement, its parts below it."""
    lines = [f"{'':3}{'measurement':20}{'value':>9}  wanted"]
    for name, result in results.items():
        lines.append(f"{'ok' if result.met else '!!':3}{name:20}{result.value:9.3f}  {result.wanted}".rstrip())
        lines.extend(f"{'':6}{part:44}{number:14,.3f}" for part, number in result.parts.items())
    return "\n".join(lines)
