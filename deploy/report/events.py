"""The events of a run by step: health, evaluations, replicas that joined, left or died. Runs anywhere."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from deploy.report.health import health_events
from deploy.report.run_files import RunFiles

REPLICAS = {"joined": "joined", "leaving": "is told to leave", "left": "left", "died": "died"}


def events_of(run: RunFiles) -> list[dict[str, Any]]:
    """All events, by step: {step, kind, text}, and more for a health event (deploy/report/health.py)."""
    events = [*health_events(run), *_evaluations(run.evaluations), *_replicas(run.pool_events, run.metrics)]
    return sorted(events, key=lambda event: event["step"])


def _evaluations(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"step": record["policy_version"], "kind": "evaluation", "text": f"held-out {_result(record)}"}
        for record in evaluations
    ]


def _result(record: Mapping[str, Any]) -> str:
    rate = record.get("pass_at_1")
    return f"score {record['score']:.3f}" if rate is None else f"pass@1 {rate:.1%}"


def _replicas(pool_events: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """An event belongs to the step whose record is the first one after it."""
    times = [record.get("time", 0) for record in metrics]
    steps = [record["step"] for record in metrics]
    events = []
    for event in pool_events:
        kind = event.get("event")
        if kind not in REPLICAS or kind == "leaving":
            continue
        place = bisect_left(times, event.get("time", 0))
        step = steps[place] if place < len(steps) else (steps[-1] + 1 if steps else 0)
        reason = f": {event['reason']}" if event.get("reason") else ""
        events.append({"step": step, "kind": kind, "text": f"{event.get('replica')} {REPLICAS[kind]}{reason}"})
    return events
