"""Compares the settings of a run that continues with those in its journal. Runs in the driver.

The journal's `begin` note has every setting, and `change` notes have those that changed since. RUN/config.toml is a
copy for people and for the next start. Edits of it by hand are found here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from common.config.description import changeable, recorded
from common.config.ppo import Config
from common.errors import UserError
from learner.loop.notes import Note

_NONE = "left out"
# Settings that name a file or directory, by the name of the digest of their contents.
_PATHS = {
    "model": "model.path",
    "critic": "learner.critic_path",
    "prompts.train": "prompts.train",
    "prompts.heldout": "prompts.heldout",
}


def settled(
    cfg: Config, notes: Sequence[Note], next_step: int, changed: Sequence[str], known: Collection[str]
) -> tuple[Config, dict[str, Any]]:
    """The settings to continue with, and the changes (--change) that the journal does not have yet. Raises UserError if
    any other setting differs from the journal.

    `next_step`: number of the journal's next step. `changed`: keys given with --change. `known`: names whose contents
    are compared by digest, so that a file or directory may be moved.
    """
    begun = next(note.fields["config"] for note in notes if note.kind == "begin")
    now, recorded_keys, leave = leaves(cfg), set(recorded(Config)), _left_to_digests(known)
    free = tuple(changeable(Config))
    sections = tuple(key for key in free if key.endswith("."))
    journal = _as_now(begun)
    unwritten: dict[str, list[Any]] = {}  # by key, values before changes that no step was learned with yet
    for note in notes:
        for key, value in note.fields["settings"].items() if note.kind == "change" else ():
            if note.before_step == next_step:
                unwritten.setdefault(key, []).append(journal.get(key))
            journal[key] = value
    taken: dict[str, Any] = {}
    faults: list[str] = []
    for key in sorted(now.keys() | journal.keys()):
        old, new = journal.get(key), now.get(key)
        if old == new or key in changed or key in leave:
            continue
        # A path may change only if its contents are compared by digest: then it is in `leave`.
        if key not in _PATHS.values() and (key in free or key.startswith(sections)):
            continue
        if new in unwritten.get(key, []):  # a crash after the note was written, and before config.toml was
            taken[key] = old
            continue
        remedy = f", or give it with --change {key}={new}" if key in recorded_keys else ""
        faults.append(
            f"{key} is {_NONE if new is None else new}, but {_NONE if old is None else old} in the journal{remedy}"
        )
    if faults:
        raise UserError(
            "config.toml in the run directory was edited, and a run cannot continue with other settings: "
            f"{'; '.join(faults)}. Undo the edit, or start a new run"
        )
    new_values = {key: now[key] for key in changed if now.get(key) != journal.get(key)}
    return (_with(cfg, taken) if taken else cfg), new_values


def leaves(cfg: Config) -> dict[str, Any]:
    """Every setting with its value, by key: `optimizer.learning_rate`, `reward.sources.0.weight`."""
    return dict(_leaves(cfg.model_dump(mode="json", exclude_none=True), ""))


def _leaves(tree: Any, prefix: str) -> list[tuple[str, Any]]:
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{prefix}.{key}" if prefix else key)]
    if isinstance(tree, list) and any(isinstance(entry, dict) for entry in tree):
        return [leaf for number, value in enumerate(tree) for leaf in _leaves(value, f"{prefix}.{number}")]
    return [(prefix, tree)]


def _as_now(begun: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the run began with. Settings that are newer than the run have their defaults."""
    try:
        return leaves(Config.model_validate(begun))
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise UserError(
            f"the journal's settings do not fit this version of Ratchet ({key}: {fault['msg']}); continue with the "
            "version that began the run"
        ) from error


def _left_to_digests(known: Collection[str]) -> set[str]:
    """Settings that name a file or directory whose contents are compared instead of its path."""
    return {_PATHS.get(name, f"{name}.model") for name in known}


def _with(cfg: Config, values: Mapping[str, Any]) -> Config:
    tree = cfg.model_dump(mode="json", exclude_none=True)
    for key, value in values.items():
        *sections, leaf = key.split(".")
        place = tree
        for name in sections:
            place = place[name]
        place[leaf] = value
    return Config.model_validate(tree)
