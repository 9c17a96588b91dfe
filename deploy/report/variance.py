"""The page's variance tab, from the file that `ratchet evaluate --variance` wrote. Runs anywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.report.curves import short
from deploy.variance.record import RECORD, advantages_used
from learner.ppo.critic_quality import PARTS


def variance_of(run: Path, unreadable: list[str]) -> dict[str, Any] | None:
    """The data of the tab; None if the run has no such file. Adds the file to `unreadable` if it cannot be read."""
    path = run / RECORD
    if not path.is_file():
        return None
    try:
        return _tab(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        unreadable.append(RECORD)
        return None


def _tab(account: Mapping[str, Any]) -> dict[str, Any]:
    explained = account["explained_variance"]
    used = advantages_used(account)
    return {
        "used": used,
        **{key: int(account[key]) for key in ("step", "responses", "prompts", "tokens")},
        "batches": [int(account["batches"][0]), int(account["batches"][-1])],
        "gradients": {key: int(account["gradients"][key]) for key in ("parts", "weights", "kept")},
        "returns_variance": _figure(account["returns"]["variance"]),
        "estimators": [_estimator(str(name), figures, used) for name, figures in account["estimators"].items()],
        "explained": [
            {
                "part": title,
                "share": _figure(explained[name]["explained_variance"]),
                "returns_variance": _figure(explained[name]["returns_variance"]),
            }
            for name, title in (PARTS.items() if explained else ())
        ],
        "left_out": [f"{name}: {reason}" for name, reason in account["left_out"].items()],
    }


def _estimator(name: str, figures: Mapping[str, Any], used: str) -> dict[str, Any]:
    noise, other = figures[used], figures["unwhitened" if used == "whitened" else "whitened"]
    return {
        "name": name,
        "own": bool(figures["is_runs_own"]),
        "mean": _number(figures["mean"]),
        "variance": _figure(figures["variance"]),
        "of_returns": _figure(figures["of_returns"]),
        "error": _figure(noise["relative_standard_error"]),
        "other_error": _figure(other["relative_standard_error"]),
        "noise_scale": _figure(noise["noise_scale"]),
        "against_none": _figure(noise["against_none"]),
        "direction": _figure(noise.get("direction")),
    }


def _figure(figure: Mapping[str, Any] | None) -> list[float | None] | None:
    """[value, low end, high end]; an end is None if it is open. None for no figure."""
    if figure is None:
        return None
    ends = figure["interval"] or (None, None)
    return [_number(figure["value"]), *(None if end is None else _number(end) for end in ends)]


def _number(value: Any) -> float | None:
    return short(float(value)) if math.isfinite(value) else None
