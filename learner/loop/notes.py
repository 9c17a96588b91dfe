"""Notes in the journal: what happened to a run between its batches, and what follows. Runs in the driver.

RUN/journal/note-000124-000.json is the first note before step 124. It is a JSON object with these fields, and those of
its kind:

    schema       version of the journal's layout (learner/loop/chain.py)
    before_step  the number of the next step, when the note was written
    number       number of the note among those before this step, from 0
    kind         see below
    time         when it was written, in seconds since 1970 (UTC)
    previous     SHA-256 of the journal's entry before it

    begin   the run begins. `identity`: digests of everything the run depends on, by name. `config`: its settings.
            `num_prompts`: of prompts.train. `versions`: of Ratchet and its libraries. `learns`: false if no step is
            ever learned from (learner/loop/sampling.py); left out otherwise. It is the first entry of the journal, and
            only there.
    void    the batch of `step` is never learned from. `reason`, and the `sample_ids` of its rollouts. The learner skips
            the step: its number grows by one, and nothing else changes.
    change  `settings` have new values from the next step on, as {key: value}.
    accept  something that the run depends on was replaced, and the user accepted it. `identity`: the new digests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Note:
    """One note of the journal. `fields` are those of its kind."""

    before_step: int
    number: int
    kind: str
    time: float  # seconds since 1970
    fields: Mapping[str, Any]


def learns(notes: Iterable[Note]) -> bool:
    """False for a journal of a policy that never learns: version 0 of the weights wrote every token."""
    return all(note.fields.get("learns", True) for note in notes if note.kind == "begin")


def voided(notes: Iterable[Note]) -> dict[int, str]:
    """The steps whose batches are never learned from, each with the reason."""
    return {note.fields["step"]: note.fields["reason"] for note in notes if note.kind == "void"}


def settings_at(notes: Iterable[Note], step: int) -> dict[str, Any]:
    """All settings that ever changed, with the values that `step` is learned with."""
    settings: dict[str, Any] = {}
    first: Mapping[str, Any] = {}
    for note in notes:
        if note.kind == "begin":
            first = note.fields["config"]
        elif note.kind == "change":
            for key, value in note.fields["settings"].items():
                settings.setdefault(key, _value(first, key))
                if note.before_step <= step:
                    settings[key] = value
    return settings


def identity(notes: Iterable[Note], before_step: int | None = None) -> dict[str, str]:
    """Digests of everything that the run depends on, with those that the user accepted. `before_step`: only those that
    were accepted before this step was written."""
    digests: dict[str, str] = {}
    for note in notes:
        if note.kind in ("begin", "accept") and (before_step is None or note.before_step <= before_step):
            digests |= note.fields["identity"]
    return digests


def _value(tree: Mapping[str, Any], key: str) -> Any:
    """The value of `section.field` in a tree of settings; None if it is left out."""
    found: Any = tree
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found
