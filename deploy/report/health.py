"""The health events of a run, computed again from its records. Runs anywhere.

An event lasts for several steps. The page shows it once, at the step where it began.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.config.loading import load_config
from common.config.ppo import Config
from common.errors import UserError
from common.health.health import QUIET, Event, Health
from deploy.report.run_files import RunFiles


def health_events(run: RunFiles) -> list[dict[str, Any]]:
    """One for each time that a rule began to hold: {step, last, kind, rule, text, advice, anchor}."""
    cfg = _config(run.directory)
    if cfg is None:
        in_steps = ((r["step"], _recorded(r)) for r in run.metrics)
        in_evaluations = ((r["policy_version"], _recorded(r)) for r in run.evaluations)
    else:
        health = Health(cfg)
        in_steps = ((r["step"], health.step(r)) for r in run.metrics)
        in_evaluations = ((r["policy_version"], health.evaluation(r)) for r in run.evaluations)
    return [*_episodes(in_steps), *_episodes(in_evaluations, between=None)]


def _episodes(seen: Iterable[tuple[int, list[Event]]], *, between: int | None = QUIET) -> list[dict[str, Any]]:
    """Joins events of one rule that are at most `between` steps apart (None: any number). The newest message counts."""
    episodes: list[dict[str, Any]] = []
    newest: dict[str, dict[str, Any]] = {}
    for step, events in seen:
        for event in events:
            episode = newest.get(event.rule)
            if episode is None or (between is not None and step - episode["last"] > between):
                episode = {"step": step, "kind": "health", "rule": event.rule, "times": 0}
                episodes.append(episode)
                newest[event.rule] = episode
            episode |= {"last": step, "times": episode["times"] + 1, "anchor": event.anchor}
            text = f"{event.rule}: {event.message}" if event.message else event.rule
            episode |= {"text": text, "advice": event.remedy}
    return episodes


def _config(directory: Path) -> Config | None:
    """None if this version cannot read the config, because another version made the run."""
    try:
        return load_config(directory / "config.toml", [], Config)
    except UserError:
        return None


def _recorded(record: Mapping[str, Any]) -> list[Event]:
    """The names that the run wrote into a record."""
    names = record.get("health")
    return [Event(str(name), "", "") for name in names] if isinstance(names, list) else []
