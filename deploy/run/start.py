"""Compares a start of `ratchet train` with the journal of the run, and records the start in the journal.

Runs in the driver that owns the run directory. `Start.record` is called once nothing can refuse the run any more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config.ppo import Config
from common.errors import UserError
from common.types import PromptRecord
from deploy.policy_files import PolicyFiles
from deploy.run.critic import check_critic, warn_of_seen_responses
from deploy.run.identity import accepted_differences, identity_of, kept_names, shown_names
from deploy.run.provenance import versions
from deploy.run.record import read_record, remember_journal
from deploy.run.settings import settled
from learner.loop.journal import Journal
from learner.loop.prompts import PromptStream


@dataclass(frozen=True)
class Start:
    """The settings of this start, and the notes to write into the journal, each as (kind, fields)."""

    directory: Path
    cfg: Config
    notes: Sequence[tuple[str, Mapping[str, Any]]]

    def record(self) -> None:
        """Writes the notes."""
        journal = Journal(self.directory / "journal")
        journal.open_for_writing()
        for kind, fields in self.notes:
            journal.note(kind, **fields)
        remember_journal(self.directory, journal.digest(0))


def planned_start(
    directory: Path,
    cfg: Config,
    policy: PolicyFiles,
    records: Sequence[Sequence[PromptRecord]],
    prompts: PromptStream,
    *,
    resume: bool,
    changed: Sequence[str] = (),
    accepted: Sequence[str] = (),
) -> Start:
    """The start of a new run or, with `resume`, of the run in `directory`. Raises UserError for a trained critic that
    does not fit the run, and as `resumed_start` does. `records`: training prompts, and held-out prompts."""
    begun = resume and bool(Journal(directory / "journal").notes)
    critic = check_critic(cfg, policy, begun=begun)
    identity = identity_of(cfg, policy, *records, critic=cfg.critic_path)
    if critic is not None and not begun:
        warn_of_seen_responses(cfg, critic, identity["prompts.train"])
    if resume:
        return resumed_start(directory, cfg, identity, prompts, changed=changed, accepted=accepted)
    return new_start(directory, cfg, identity, prompts)


def new_start(
    directory: Path, cfg: Config, identity: Mapping[str, str], prompts: PromptStream, *, learns: bool = True
) -> Start:
    """The start of a new run. Without `learns` its journal has only responses of the starting policy."""
    begin: dict[str, Any] = {
        "identity": identity,
        "config": cfg.model_dump(mode="json", exclude_none=True),
        "num_prompts": prompts.num_prompts,
        "versions": versions(),
    }
    if not learns:
        begin["learns"] = False
    return Start(directory, cfg, [("begin", begin)])


def resumed_start(
    directory: Path,
    cfg: Config,
    identity: Mapping[str, str],
    prompts: PromptStream,
    *,
    changed: Sequence[str] = (),
    accepted: Sequence[str] = (),
    learns: bool = True,
) -> Start:
    """The start of a run that continues; brings `prompts` to the end of the journal. Raises UserError if settings or
    inputs are not those of the journal, except settings that --change names and inputs that --accept names."""
    journal = Journal(directory / "journal")
    journal.verify()
    last = journal.last()
    if not journal.notes and last is None:  # the run was killed before its journal began
        return new_start(directory, cfg, identity, prompts, learns=learns)
    if not journal.notes:
        raise UserError(f"{journal.directory} has no beginning (note-000000-000.json); restore it from a copy")
    if read_record(directory).get("journal", journal.digest(0)) != journal.digest(0):
        raise UserError(
            f"{journal.directory} is the journal of another run than {directory}; restore the run's own (is the right "
            "storage mounted?)"
        )
    before = journal.identity
    new = accepted_differences(identity, before, accepted, shown_names(cfg), kept_names(cfg))
    cfg, values = settled(cfg, journal.notes, journal.next_step, changed, identity.keys() & before.keys())
    if last is not None:
        prompts.restore(last.prompts)  # raises an error for other prompts now, not after minutes of replay
    notes: list[tuple[str, Mapping[str, Any]]] = []
    if new:
        notes.append(("accept", {"identity": new}))
    if values:
        notes.append(("change", {"settings": values}))
    return Start(directory, cfg, notes)
