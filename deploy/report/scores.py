"""The page's score tab: sources against judges, KL against score, calibration of reward models. Runs anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.files import read_records
from deploy.report.run_files import RunFiles


def scores_of(run: RunFiles) -> dict[str, Any]:
    """The data of the tab that the curves do not have."""
    settings = [source for source in run.setting("reward.sources", []) if isinstance(source, dict)]
    sources = [str(source.get("name")) for source in settings]
    judged = dict.fromkeys(name for record in run.evaluations for name in record.get("components", {}))
    heldout = [
        {
            "version": record["policy_version"],
            "score": record.get("score"),
            "kl": record.get("kl_per_response"),
            "components": record.get("components", {}),
        }
        for record in run.evaluations
    ]
    training = [
        [record["step"], record["kl/per_response"], record["rollout/score/mean"]]
        for record in run.metrics
        if all(isinstance(record.get(key), int | float) for key in ("kl/per_response", "rollout/score/mean"))
    ]
    calibrations = [found for source in settings if (found := _calibration(source))]
    return {
        "sources": sources,
        "judges": [name for name in judged if name not in sources],
        "heldout": heldout,
        "training": training[:: max(1, len(training) // 2000)],
        "calibrations": calibrations,
    }


def _calibration(source: dict[str, Any]) -> dict[str, Any] | None:
    """The last held-out evaluation of a reward model, if `ratchet train-reward` made it and its run is still there."""
    if not isinstance(source.get("model"), str):
        return None
    records = read_records(Path(source["model"]).parent / "evaluations.jsonl")
    last = next((record for record in reversed(records) if isinstance(record.get("bins"), list)), None)
    if last is None:
        return None
    keys = ("pairs", "accuracy", "interval", "calibration_error", "bins")
    return {"source": source.get("name"), **{key: last.get(key) for key in keys}}
