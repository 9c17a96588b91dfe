"""Settings that changed during a run. Runs in the driver.

`ratchet train --resume RUN --change KEY=VALUE` writes a `change` note (learner/loop/notes.py). When a
step is learned again from the journal, it gets the values that it was first learned with.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from common.config.ppo import Config
from learner.loop.notes import Note, settings_at


def config_at(cfg: Config, notes: Iterable[Note], step: int) -> Config:
    """The newest config `cfg` with the values that `step` is learned with."""
    if not (settings := settings_at(notes, step)):
        return cfg
    tree = cfg.model_dump(mode="json", exclude_none=True)
    for key, value in settings.items():
        _set(tree, key, value)
    return Config.model_validate(tree)


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    for name in sections:
        tree = tree.setdefault(name, {})
    if value is None:
        tree.pop(leaf, None)
    else:
        tree[leaf] = value
