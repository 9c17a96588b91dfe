"""The parts of an experiment in docs/results.md: commands, arms and columns. Only data: nothing here runs a command.

A `Work` is one command of Ratchet with a shipped config, in a directory of its own. An `Arm` is a work that a table
compares with others; an `Experiment` is a table. To add an ablation, add an entry to EXPERIMENTS
(tests/results/experiments.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.results.finished import Finished


@dataclass(frozen=True)
class Work:
    """One command, run once for each seed. `needs` run before it; `{NAME}` in a setting or option is the
    directory of the need with this name."""

    name: str
    config: str  # a file of deploy/configs
    settings: tuple[str, ...] = ()
    command: str = "train"
    options: tuple[str, ...] = ()
    needs: tuple[Work, ...] = ()
    seeded: bool = True  # False: one directory for all seeds, made with seed 0

    @property
    def result(self) -> str:
        """The file that a finished command leaves in its directory."""
        return "evaluation.json" if self.command == "evaluate" else "summary.json"

    def directory(self, seed: int) -> str:
        """Its directory below the root of all results."""
        return f"{self.name}/seed-{seed}" if self.seeded else f"{self.name}/all-seeds"


@dataclass(frozen=True)
class Arm:
    """One row of a table."""

    title: str
    work: Work
    critic: Work | None = None  # trained before the run, on `critic_responses` more responses
    critic_responses: int = 0


@dataclass(frozen=True)
class Column:
    """One number of each run; the table has its mean over the seeds. None: this run does not have it."""

    title: str
    value: Callable[[Finished], float | None]
    form: str = "{:.2f}"
    missing: str = "-"  # where no run has it


def percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


@dataclass(frozen=True)
class Experiment:
    """A table. `about` says what is compared, and how each column is measured."""

    about: str
    arms: tuple[Arm, ...]
    columns: tuple[Column, ...]
    minutes: int = 0  # of all arms with one seed, on two cores; estimated

    def chosen(self, names: list[str]) -> list[Arm]:
        """The arms whose works have these names; all if none is named. Raises ValueError for an unknown name."""
        known = {arm.work.name: arm for arm in self.arms}
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"{unknown[0]} is no arm of this experiment; its arms: {', '.join(known)}")
        return [known[name] for name in names or known]
