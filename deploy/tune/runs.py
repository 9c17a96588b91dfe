"""The runs of a tuning, from its plan and its events: which have ended, which are finalists, which are missing.

Runs anywhere. `ratchet tune` starts the missing runs (search.py); the report only reads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from deploy.tune.events import COMPLETE, STOPPED_BY_ASHA, Events, RunState
from deploy.tune.following import Job
from deploy.tune.plan import Plan

_LONGEST_LABEL = 60  # characters of the settings in the name of a run directory


@dataclass
class Runs:
    """The runs of a tuning in `directory`."""

    plan: Plan
    directory: Path
    events: Events

    def __post_init__(self) -> None:
        self.trials = [Job(number) for number in range(1, len(self.plan.trials) + 1)]

    def directory_of(self, job: Job) -> Path:
        """The run directory of a job, such as DIR/trials/003-clip_eps-0.1."""
        label = "-".join(f"{key.rpartition('.')[2]}-{value}" for key, value in self.plan.trials[job.trial - 1].items())
        label = re.sub(r"[^\w.-]+", "_", label)[:_LONGEST_LABEL].rstrip("-._")
        return self.directory / "trials" / (f"{job.name}-{label}" if not job.repeat else job.name)

    def finalists(self, *, interrupted: bool = False) -> list[Job]:
        """The best trials: complete ones first, then those with the most steps. With equal steps the value decides.
        With `interrupted`, trials that have not ended count too."""

        def rank(job: Job) -> tuple[bool, tuple[int, float]]:
            state = self.events.run(job.name)
            return state.outcome == COMPLETE or state.continues_as_finalist, state.last or (-1, 0.0)

        possible = [job for job in self.trials if _can_be_finalist(self.events.run(job.name), interrupted)]
        return sorted(possible, key=rank, reverse=True)[: self.plan.finalists]

    def repeats(self) -> list[Job]:
        """Every run with a further seed that the tuning may need: those of all trials, as if all were finalists."""
        return [Job(job.trial, repeat) for job in self.trials for repeat in range(1, self.plan.seeds)]

    def waiting_trials(self) -> list[Job]:
        """Trials that have not ended."""
        states = {job: self.events.run(job.name) for job in self.trials}
        return [job for job, state in states.items() if state.outcome is None and not state.continues_as_finalist]

    def waiting_repeats(self) -> list[Job]:
        """Missing runs of the finalists, seed by seed: after an early end, finalists have about equal numbers of seeds.
        A finalist that ASHA has stopped continues to its end."""
        jobs = [Job(job.trial, repeat) for repeat in range(self.plan.seeds) for job in self.finalists()]
        return [job for job in jobs if self.events.run(job.name).outcome in (None, STOPPED_BY_ASHA)]

    def has_begun(self, job: Job) -> bool:
        """True if the run was started at least once."""
        return self.events.run(job.name).seconds > 0 or self.directory_of(job).exists()


def _can_be_finalist(state: RunState, interrupted: bool) -> bool:
    """True if a trial can be a finalist: it is complete, or only ASHA has stopped it."""
    continues = state.outcome is None and (state.continues_as_finalist or interrupted)
    return continues or state.outcome in (COMPLETE, STOPPED_BY_ASHA)
