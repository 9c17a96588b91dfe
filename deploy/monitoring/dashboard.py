"""The Grafana dashboard of Ratchet's metrics, made from their table. Runs anywhere.

`ratchet monitoring` writes it. A new row of common/metrics/table.py is a new panel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from common.metrics.table import ENDPOINT, METERS, STEP, Meter, Metric

# Titles of the rows of panels. The key is the first part of a metric's key, or of a meter's name after "ratchet_".
ROWS = {
    "health": "Health",
    "step": "Progress",
    "evaluation": "Held-out evaluation",
    "rollout": "Rollouts and scores",
    "reward": "Reward sources",
    "environment": "Environments",
    "kl": "KL from the reference",
    "ppo": "PPO",
    "value": "Critic",
    "mismatch": "Learner against generators",
    "staleness": "Age of rollouts",
    "wait": "Who waits",
    "time": "Seconds of a step",
    "learner": "Tokens",
    "weights": "New weights",
    "generator": "Generators",
    "vllm": "vLLM",
    "scored": "Reward and reference",
    "pool": "Replicas",
}
# Metrics in the row of others: the beginning of a name, and the row.
_JOINED = {"time": "step", "policy_version": "step", "batch": "scored", "reward_voids": "scored"}
_LABELS = {"reward/NAME/score": ["source"], "reward/NAME/KEY": ["source", "figure"], "health": ["rule"]}
_UNITS = {"seconds": "s", "bytes": "bytes", "share": "percentunit", "seconds since 1970": "dateTimeFromNow"}
_VLLM = (  # vLLM's own; they have Ray's WorkerId instead of a replica
    Meter("vllm_num_requests_running", "gauge", "requests", ("replica",), "in the engine's batch"),
    Meter("vllm_kv_cache_usage_perc", "gauge", "share", ("replica",), "1: requests wait for memory"),
    Meter("vllm_generation_tokens_total", "counter", "tokens", ("replica",), "tokens sampled by the engine"),
    Meter("vllm_time_to_first_token_seconds", "histogram", "seconds", ("replica",), "from request to first token"),
)
_NAMED = " * on (WorkerId) group_left (replica) (ray_ratchet_generator_weights_version * 0 + 1)"
WRITTEN = "Written by ratchet monitoring."  # in every file of the command, also in this one
_WIDTH, _HEIGHT, _COLUMNS = 8, 7, 3
_SOURCE = {"type": "prometheus", "uid": "${source}"}


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it. It asks for one or more runs."""
    found = sorted([*_step_panels(), *_meter_panels()], key=lambda row_and_panel: list(ROWS).index(row_and_panel[0]))
    panels: list[dict[str, Any]] = []
    y = 0
    for row, members in groupby(found, key=lambda row_and_panel: row_and_panel[0]):
        place = _place(0, y, width=24, height=1)
        panels.append({"type": "row", "title": ROWS[row], "gridPos": place, "collapsed": False, "panels": []})
        y += 1
        for number, (_, panel) in enumerate(members):
            place = _place(number % _COLUMNS * _WIDTH, y + number // _COLUMNS * _HEIGHT)
            panels.append({**panel, "gridPos": place})
        y = panels[-1]["gridPos"]["y"] + _HEIGHT
    return {
        "description": WRITTEN,  # first, so that the file begins with it
        "uid": "ratchet",
        "title": "Ratchet",
        "tags": ["ratchet", "rlhf"],
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_SOURCES, _choice("run", "Run", "ratchet_step"), _choice(*_SESSION)]},
        "panels": [{**panel, "id": number} for number, panel in enumerate(panels, 1)],
    }


_SOURCES = {"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
_SESSION = ("SessionName", "Ray cluster", "ray_ratchet_pool_replicas")


def _choice(label: str, title: str, metric: str) -> dict[str, Any]:
    """A variable of the dashboard: any number of the label's values."""
    return {
        "name": label,
        "label": title,
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": f"label_values({metric}, {label})", "refId": label},
        "refresh": 2,  # whenever the time range changes
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _step_panels() -> Iterator[tuple[str, dict[str, Any]]]:
    for metric in (*STEP, *ENDPOINT):
        shown = ["run", *_LABELS.get(metric.key, [])]
        query = f'{metric.prometheus}{{run=~"$run"}}'
        if metric.unit == "seconds since 1970":
            query += " * 1000"  # Grafana's dates count milliseconds
        about = f"{metric.meaning} ({metric.unit}, {metric.reduced_by})"
        kind = "state-timeline" if metric.key == "health" else "timeseries"
        yield _row(metric), _panel(metric.key, metric.unit, about, [(query, shown, "")], kind)


def _meter_panels() -> Iterator[tuple[str, dict[str, Any]]]:
    for meter in (*METERS.values(), *_VLLM):
        labels = [tag for tag in meter.tags if tag != "role" or "replica" not in meter.tags]  # a replica names its role
        about = f"{meter.meaning} ({meter.unit})"
        yield _row(meter), _panel(meter.name.removeprefix("ratchet_"), meter.unit, about, _queries(meter, labels))


def _queries(meter: Meter, labels: Sequence[str]) -> list[tuple[str, Sequence[str], str]]:
    """Query, labels and a word for the legend of each curve."""
    name, chosen = f"ray_{meter.name}", '{SessionName=~"$SessionName"}'
    named = _NAMED if meter in _VLLM else ""
    by = ", ".join(labels)
    match meter.kind:
        case "counter":
            return [(f"sum by ({by}) (rate({name}{chosen}[$__rate_interval]){named})", labels, "per second")]
        case "gauge":
            return [(f"sum by ({by}) ({name}{chosen}{named})", labels, "")]
        case _:
            rate = f"sum by ({by}, le) (rate({name}_bucket{chosen}[$__rate_interval]){named})"
            return [(f"histogram_quantile({q}, {rate})", labels, f"{q:.0%}") for q in (0.5, 0.95)]


def _panel(
    title: str, unit: str, about: str, queries: Sequence[tuple[str, Sequence[str], str]], kind: str = "timeseries"
) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + number),
            "datasource": _SOURCE,
            "expr": query,
            "legendFormat": " ".join([*(f"{{{{{label}}}}}" for label in labels), *([word] if word else [])]),
        }
        for number, (query, labels, word) in enumerate(queries)
    ]
    return {
        "type": kind,
        "title": title,
        "description": about,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": {"unit": _UNITS.get(unit, "short")}, "overrides": []},
        "targets": targets,
    }


def _row(metric: Metric | Meter) -> str:
    """The key of its row in ROWS. A metric of a new kind fails here, and so in a test."""
    name = metric.key if isinstance(metric, Metric) else metric.name.removeprefix("ratchet_")
    joined = next((row for start, row in _JOINED.items() if name == start or name.startswith(f"{start}_")), None)
    return joined or next(row for row in ROWS if name == row or name.startswith((f"{row}/", f"{row}_")))


def _place(x: int, y: int, *, width: int = _WIDTH, height: int = _HEIGHT) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}
