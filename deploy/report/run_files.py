"""The small files of a run directory. Runs anywhere.

Every file may be missing or unfinished: the run may still be writing it, or has crashed, or an older version wrote
it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from common.errors import UserError
from common.files import read_record as parse_record
from common.files import read_records
from deploy.run.lock import is_owned
from deploy.run.record import read_record

NUMBER = (int, float)
EXPLAINED = "value/explained_variance/realised"
_EVALUATION = {"pass_at_1": NUMBER, "interval": list, "components": dict, "kl_per_response": NUMBER}


@dataclass(frozen=True)
class RunFiles:
    """The small files of a run, in memory. The journal and the credit files are read step by step."""

    directory: Path
    config: Mapping[str, Any]  # of config.toml
    record: Mapping[str, Any]  # of run.json
    metrics: list[dict[str, Any]]  # one record for each step, in order
    evaluations: list[dict[str, Any]]  # in order of their versions
    pool_events: list[dict[str, Any]]
    summary: Mapping[str, Any]
    running: bool  # a process works in the directory
    is_critic: bool  # made by `ratchet train-critic`: steps train a critic, and the journal's policy never learns
    passes: list[dict[str, Any]]  # of a critic: its evaluations on held-out prompts, by step

    @classmethod
    def read(cls, directory: Path) -> RunFiles:
        """Raises UserError if this is no directory of `ratchet train` or `ratchet train-critic`."""
        if not directory.is_dir():
            raise UserError(f"{directory} is not a directory; name the directory of a run")
        record = read_record(directory)
        command = record.get("command", "train" if (directory / "journal").is_dir() else None)
        if command not in ("train", "train-critic") or not (directory / "config.toml").is_file():
            made = f"ratchet {command} made it" if command else "it has no run.json and no journal"
            raise UserError(
                f"{directory} must be the directory of a run of ratchet train, train-critic, evaluate or tune, but "
                f"{made}; name another"
            )
        is_critic = command == "train-critic"
        steps = {
            record["step"]: record for record in _sound(directory / "metrics.jsonl", {"step": int, "time": NUMBER})
        }
        path = directory / "evaluations.jsonl"
        evaluations = _sound(path, {"policy_version": int, "score": NUMBER}, _EVALUATION)
        passes = _sound(path, {"step": int, EXPLAINED: NUMBER}) if is_critic else []
        versions = {record["policy_version"]: record for record in evaluations}
        return cls(
            directory=directory,
            config=read_config(directory / "config.toml"),
            record=record,
            metrics=[steps[step] for step in sorted(steps)],
            evaluations=[versions[version] for version in sorted(versions)],
            pool_events=_sound(directory / "pool-events.jsonl", {"time": NUMBER, "event": str}),
            summary=_json(directory / "summary.json"),
            running=is_owned(directory),
            is_critic=is_critic,
            passes=sorted(passes, key=lambda record: record["step"]),
        )

    def setting(self, path: str, default: Any = None) -> Any:
        """The value of a setting such as `ppo.gamma`; `default` if the config does not have it, or has it with another
        type than that of `default`: a user may have edited the file."""
        value: Any = self.config
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if default is None:
            return value
        kind: Any = NUMBER if isinstance(default, NUMBER) else type(default)
        return value if isinstance(value, kind) else default


def _sound(path: Path, required: Mapping[str, Any], optional: Mapping[str, Any] = MappingProxyType({})) -> list[Any]:
    """The records whose `required` fields have the right types. Drops `optional` fields of a wrong type."""
    records = [r for r in read_records(path) if all(isinstance(r.get(key), kind) for key, kind in required.items())]
    return [{k: v for k, v in r.items() if k not in optional or isinstance(v, optional[k])} for r in records]


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a run's config.toml. Raises UserError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); restore it") from None


def _json(path: Path) -> dict[str, Any]:
    return (parse_record(path.read_bytes()) if path.is_file() else None) or {}
