"""The curves of a run: every metric, in named groups, each with its unit and meaning. Runs anywhere."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.metrics.table import CRITIC_STEP, STEP, Metric
from deploy.report.run_files import RunFiles

# Name of a group, and the beginnings of its keys. A key belongs to the first group that fits.
GROUPS = (
    ("Score", ("rollout/score", "reward/")),
    ("Held-out evaluations", ("heldout/",)),
    ("Responses", ("rollout/",)),
    ("Environment", ("environment/",)),
    ("Distance from the reference", ("kl/",)),
    ("Policy update", ("ppo/",)),
    ("Critic", ("value/", "critic/")),
    ("Learner and engine", ("mismatch/",)),
    ("Staleness and waiting", ("staleness/", "wait/")),
    ("Time of a step", ("time/",)),
    ("Weights and batch size", ("weights/", "learner/")),
    ("Other", ("",)),
)
_METRICS = {metric.key: metric for metric in (*CRITIC_STEP, *STEP)}  # if both have a key, the row of STEP counts
_UNSHOWN = {"step", "time", "health", "epoch"}
_LINK = re.compile(r" ?\(?\[([^]]*)\]\([^)]*\)\)?")
MAX_POINTS = 2000  # of a curve

# Held-out numbers that are drawn into the curve of a metric. Those of sources follow from their names.
_SAME = {
    "rollout/score/mean": "score",
    "kl/per_response": "kl_per_response",
    "rollout/response_tokens/mean": "response_tokens",
}
# Held-out numbers with a curve of their own: unit and meaning.
_HELDOUT = {
    "pass_at_1": ("share", "held-out prompts whose answer passes, with its 95 % interval"),
    "voids": ("answers", "held-out answers without a score; they count as failed"),
    "distinct_1": ("share", "distinct tokens of all answers; falls when answers become alike"),
    "distinct_2": ("share", "distinct token pairs of all answers; falls when answers become alike"),
}


def curves_of(run: RunFiles) -> list[dict[str, Any]]:
    """The groups that have curves: {name, curves: [{key, unit, meaning, x, y, heldout}]}."""
    keys = dict.fromkeys(key for record in run.metrics for key in record if key not in _UNSHOWN)
    curves = [curve for key in keys if (curve := _training_curve(key, run)) is not None]
    curves += _heldout_curves(run) + _curves_of_passes(run, set(keys))
    groups: dict[str, list[dict[str, Any]]] = {name: [] for name, _ in GROUPS}
    for curve in curves:
        groups[_group(curve["key"])].append(curve)
    return [{"name": name, "curves": found} for name, found in groups.items() if found]


def _group(key: str) -> str:
    return next(name for name, starts in GROUPS if key.startswith(starts))


def metric_of(key: str) -> Metric | None:
    """The row of the table of metrics that describes a key of a record."""
    if key.startswith("reward/") and key not in _METRICS:
        return _METRICS["reward/NAME/score" if key.count("/") == 2 and key.endswith("/score") else "reward/NAME/KEY"]
    return _METRICS.get(key)


def _training_curve(key: str, run: RunFiles) -> dict[str, Any] | None:
    points = [(r["step"], float(r[key])) for r in run.metrics if isinstance(r.get(key), int | float)]
    points = [(step, value) for step, value in points if math.isfinite(value)]
    if not points:
        return None
    steps, values = thinned(*zip(*points, strict=True))
    metric = metric_of(key)
    name = key.split("/")[1] if key.startswith("reward/") and key.endswith("/score") else None
    return {
        "key": key,
        "unit": metric.unit if metric else "",
        "meaning": _plain(metric.meaning) if metric else "",
        "x": steps,
        "y": values,
        "heldout": _of_passes(run, key)
        if run.is_critic
        else _heldout(run.evaluations, lambda r: r.get("components", {}).get(name) if name else r.get(_SAME.get(key))),
    }


def _heldout_curves(run: RunFiles) -> list[dict[str, Any]]:
    """Numbers that only evaluations have: those of _HELDOUT, and the scores of judges."""
    trained = {key.split("/")[1] for record in run.metrics for key in record if key.startswith("reward/")}
    judges = dict.fromkeys(n for r in run.evaluations for n in r.get("components", {}) if n not in trained)
    curves = []
    for key, (unit, meaning) in _HELDOUT.items():
        curves.append((f"heldout/{key}", unit, meaning, _heldout(run.evaluations, lambda r, key=key: r.get(key))))
    for name in judges:
        points = _heldout(run.evaluations, lambda r, name=name: r.get("components", {}).get(name))
        curves.append(
            (f"heldout/{name}", "raw units of the judge", "mean score of a judge that is not trained on", points)
        )
    return [
        {"key": key, "unit": unit, "meaning": meaning, "x": [], "y": [], "heldout": points}
        for key, unit, meaning, points in curves
        if points["x"] and (key != "heldout/voids" or any(points["y"]))
    ]


def _curves_of_passes(run: RunFiles, trained: set[str]) -> list[dict[str, Any]]:
    """Numbers that only the evaluations of a critic have."""
    keys = dict.fromkeys(key for record in run.passes for key in record if key in _METRICS)
    return [
        {
            "key": key,
            "unit": _METRICS[key].unit,
            "meaning": _plain(_METRICS[key].meaning),
            "x": [],
            "y": [],
            "heldout": _of_passes(run, key),
        }
        for key in keys
        if key not in trained | _UNSHOWN
    ]


def _of_passes(run: RunFiles, key: str) -> dict[str, Any]:
    """A number of the evaluations of a critic, at their steps."""
    name = "loss" if key == "value/loss" else key
    return _heldout(run.passes, lambda record: record.get(name), at="step")


def _heldout(
    evaluations: Sequence[Mapping[str, Any]], value: Any, *, at: str = "policy_version"
) -> dict[str, list[Any]]:
    found = [(r, v) for r in evaluations if isinstance(v := value(r), int | float) and math.isfinite(v)]
    points: dict[str, list[Any]] = {"x": [r[at] for r, _ in found], "y": [short(v) for _, v in found]}
    if found and all(_is_interval(r.get("interval")) and v == r.get("pass_at_1") for r, v in found):
        points |= {
            "low": [short(r["interval"][0]) for r, _ in found],
            "high": [short(r["interval"][1]) for r, _ in found],
        }
    return points


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(end, int | float) for end in value)


def thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """All points. Of a long run only the lowest and the highest point of each of MAX_POINTS / 2 equal parts, so that no
    peak is lost."""
    if len(steps) <= MAX_POINTS:
        return list(steps), [short(value) for value in values]
    numbers = np.asarray(values)
    parts = np.array_split(np.arange(len(numbers)), MAX_POINTS // 2)
    chosen = sorted({int(part[pick(numbers[part])]) for part in parts for pick in (np.argmin, np.argmax)})
    return [steps[i] for i in chosen], [short(values[i]) for i in chosen]


def short(value: float) -> float:
    """The value with six significant digits."""
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _plain(text: str) -> str:
    """A meaning without Markdown."""
    return _LINK.sub("", text).replace("`", "")
