"""The journals that `ratchet train-critic` reads: which steps, whether they fit the config, and their record in RUN.

Runs in the driver. RUN/journals.json is written when the training begins. A training that continues reads the same
steps, and refuses a journal that has changed. With --sample the run's own journal is one of them, and is complete only
after the sampling. Until then RUN/sample.json has what the command line asked for.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from common.config.ppo import Config
from common.config.sources import SourceConfig
from common.errors import UserError
from common.files import write_json
from deploy.run.critic import (
    critic_sources,
    environment_of,
    response_differences,
    response_settings,
    source_differences,
)
from deploy.screen.console import complain
from learner.critic.rollouts import JournalPart, Rollouts, choose_steps
from learner.loop.journal import Journal
from learner.loop.notes import Note, identity
from learner.ppo.critic_files import CriticBasis

RECORD = "journals.json"
ASKED = "sample.json"
_SOURCE: TypeAdapter[SourceConfig] = TypeAdapter(SourceConfig)


@dataclass(frozen=True)
class Asked:
    """The data that the command line names."""

    runs: Sequence[Path] = ()  # the values of --from
    steps: str | None = None  # the steps to read of each run, such as 10:40
    responses: int = 0  # number of responses to sample from the starting policy into the run's own journal

    def parts_of_others(self, run: Path) -> list[JournalPart]:
        """The parts of --from. Raises UserError, also if --from is missing and nothing is sampled. `run`: the run
        directory of the training. No run of --from may be inside it, because --force would rename it."""
        steps, here = chosen_steps(self.steps), run.resolve()
        if inside := [path for path in self.runs if here in (real := path.resolve(), *real.parents)]:
            raise UserError(
                f"--from ({inside[0]}) is in the run directory of this training ({run}); name another directory with "
                "--run"
            )
        if self.runs or not self.responses:
            return new_parts(self.runs, steps)
        if self.steps is not None:
            raise UserError(
                f"--steps ({self.steps}) chooses among the steps of --from; name a run with it, or leave it out"
            )
        return []

    def parts(self, run: Path) -> list[JournalPart]:
        """All parts to learn from, once the run's own journal is sampled. Raises UserError."""
        return [*self.parts_of_others(run), *([choose_steps(run, slice(None))] if self.responses else [])]

    def write(self, run: Path) -> None:
        runs = [os.path.abspath(path) for path in self.runs]
        write_json(run / ASKED, {"responses": self.responses, "from": runs, "steps": self.steps})

    @classmethod
    def read(cls, run: Path) -> Asked:
        """The journals and responses that a killed sampling was asked for. Empty if the training has begun, or if
        nothing is sampled."""
        if (run / RECORD).exists() or not (run / ASKED).exists():
            return cls()
        try:
            record = json.loads((run / ASKED).read_text(encoding="utf-8"))
            return cls([Path(name) for name in record["from"]], record["steps"], int(record["responses"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{run / ASKED} cannot be read ({type(error).__name__}: {error}); restore it") from None


def chosen_steps(text: str | None) -> slice:
    """The steps of A:B, half-open. Raises UserError."""
    if text is None:
        return slice(None)
    if not (match := re.fullmatch(r"([0-9]{1,9})?:([0-9]{1,9})?", text)):
        raise UserError(f"--steps ({text}) must read A:B, such as 10:40 for steps 10 to 39, or 10: for all from 10 on")
    first, end = (int(number) if number else None for number in match.groups())
    if first is not None and end is not None and first >= end:
        raise UserError(f"--steps ({text}) has no step: A must be below B, as in {end}:{first + 1}")
    return slice(first, end)


def new_parts(runs: Sequence[Path], steps: slice) -> list[JournalPart]:
    """The chosen steps of each run's journal. Raises UserError."""
    if not runs:
        raise UserError(
            "name at least one run of ratchet train whose journal the critic learns from, with --from RUN; or have the "
            "starting policy write one, with --sample N"
        )
    names = [os.path.realpath(run) for run in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--from names {twice[0]} twice; name it once")
    return [choose_steps(run, steps) for run in runs]


def write_parts(run: Path, cfg: Config, rollouts: Rollouts) -> None:
    """Writes which journals and settings a continued training must use again."""
    training = cfg.critic_training
    fixed = {"heldout_share": training.heldout_share, "passes": training.passes}
    write_json(run / RECORD, {**fixed, "journals": rollouts.records()})


def read_parts(run: Path, cfg: Config) -> list[JournalPart]:
    """Reads what `write_parts` wrote. Raises UserError if nothing was written, or if a fixed setting differs now."""
    try:
        record = json.loads((run / RECORD).read_text(encoding="utf-8"))
        before, passes = float(record["heldout_share"]), int(record["passes"])
        parts = [JournalPart.from_record(part) for part in record["journals"]]
    except FileNotFoundError:
        raise UserError(f"{run} was stopped before it began; begin again with --force") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run / RECORD} cannot be read ({type(error).__name__}: {error}); restore it") from None
    training, schedule = cfg.critic_training, cfg.optimizer.schedule
    if training.heldout_share != before:
        raise UserError(
            f"critic_training.heldout_share ({training.heldout_share:g}) was {before:g} when this training began, and "
            "the critic has learned from the other prompts; leave it, or begin again with --force"
        )
    if training.passes != passes and schedule != "constant":
        raise UserError(
            f"critic_training.passes ({training.passes}) cannot change: the {schedule} schedule was planned for "
            f"{passes}; leave it, or begin again with --force"
        )
    return parts


def check_parts(parts: Sequence[JournalPart], basis: CriticBasis) -> None:
    """Raises UserError for a run with another model, tokenizer or reward than the config's."""
    for part in parts:
        notes = Journal(Path(part.run) / "journal").notes
        begin = next((note for note in notes if note.kind == "begin"), None)
        if begin is None:
            raise UserError(f"the journal of {part.run} does not say how its run began; restore its first note")
        for step in _steps_with_other_inputs(notes, part):
            if faults := list(_differences(begin.fields["config"], identity(notes, before_step=step), basis)):
                raise UserError(
                    f"--from ({part.run}) does not fit this config: {'; '.join(faults)}. A critic predicts the returns "
                    "of one model under one reward: name other runs, or train with the config of that run"
                )


def warn_of_other_responses(parts: Sequence[JournalPart], basis: CriticBasis) -> None:
    """Warns of journals whose responses were sampled with other settings than the config's."""
    for part in parts:
        [begin] = [note for note in Journal(Path(part.run) / "journal").notes if note.kind == "begin"]
        if different := response_differences(response_settings(begin.fields["config"]), basis.responses):
            complain(
                f"warning: --from ({part.run}) has other responses than a run with this config: {', '.join(different)}"
            )


def _steps_with_other_inputs(notes: Sequence[Note], part: JournalPart) -> list[int]:
    """The first step, and each step before which the user accepted replaced inputs (--accept)."""
    accepted = [note.before_step for note in notes if note.kind == "accept"]
    return [part.first, *(step for step in accepted if part.first < step < part.end)]


def _differences(config: Mapping[str, Any], digests: Mapping[str, str], basis: CriticBasis) -> Iterator[str]:
    if digests.get("model") != basis.model:
        yield "it began with another base model (other weights, config or tokenizer) than model.path"
    given = [_SOURCE.validate_python(source) for source in config["reward"]["sources"]]
    sources = critic_sources(given, environment_of(config), digests)
    yield from source_differences(sources, basis.sources, was="its responses were scored", now="this config has")
