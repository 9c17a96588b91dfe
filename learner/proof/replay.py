"""The learner, rebuilt from the journal. Runs in every rank of `ratchet replay`, `ratchet audit --replay` and
`ratchet evaluate --variance`.

The learner's state after a step is a function of config, initial weights and the journal up to this step. On the
machine type and device layout of the run it is the same bit for bit. No prompt is asked and nothing is scored, so
neither Ray nor vLLM is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from transformers.utils import logging as transformers_logging

from common.config.ppo import Config
from common.errors import BatchError
from learner.loop.changes import config_at
from learner.loop.credit import credit_path, write_credit
from learner.loop.journal import Journal
from learner.loop.notes import identity
from learner.ppo.learner import Learner
from learner.proof.chain import Violation
from learner.proof.credit import check_same_credit
from learner.proof.ranks import write_progress
from learner.proof.records import Metrics
from learner.proof.tensors import check_same_state, check_same_weights


@dataclass(frozen=True)
class Replay:
    """The steps to rebuild, and the values to compare on the way. It is sent to every rank."""

    cfg: Config  # with the newest settings; those of each step come from the journal
    run: Path
    until: int  # updates
    scratch: Path  # for files that are compared
    start: Path | None = None  # a checkpoint to begin with; left out: the initial weights
    checkpoints: Mapping[int, Path] = field(default_factory=dict)  # by step: each must equal the learner's state there
    policy: Path | None = None  # written by the run after `until` updates: its weights must equal the learner's
    metrics: Metrics | None = None  # the learner's own must equal those of the replay
    to: Path | None = None  # where the policy is written
    credit: range = range(0)  # the steps whose values of tokens are rebuilt, unless their batch is void
    credit_to: Path | None = None  # the directory for them; left out: they must equal those of the run
    progress: Path | None = None  # a file that gets the number of steps done so far

    def __call__(self, rank: int = 0, world: int = 1, rendezvous: str = "") -> None:
        """One rank's part. Raises Violation at the first difference."""
        journal = Journal(self.run / "journal")
        learner = learner_of_run(self.cfg, journal, self.start, rank, world, rendezvous)
        for step in range(learner.step, self.until):
            stats = learn_again(learner, self.cfg, journal, step)
            if self.progress is not None and rank == 0:
                write_progress(self.progress, "replay", step + 1, self.until)
            if self.metrics is not None and rank == 0:
                self.metrics.check_update(step, stats)
            if step in self.credit and step not in journal.voided:
                self._rebuild_credit(learner, journal, step)
            if step + 1 in self.checkpoints:
                self._compare(learner, self.checkpoints[step + 1], rank)
        if self.policy is not None:
            learner.save_policy(self.scratch / "policy", adapter=self.scratch / "adapter")
            if rank == 0:
                check_same_weights(self.policy, self.scratch / "policy")
        if self.to is not None:
            learner.save_policy(self.to, adapter=self.to / "adapter")

    def _rebuild_credit(self, learner: Learner, journal: Journal, step: int) -> None:
        """Writes what the newest update derived for each token. Without `credit_to`, compares it with the run's
        file."""
        derived, target = learner.credit(), self.credit_to or self.scratch / "credit"
        if derived is None:
            return  # rank 0 does it
        write_credit(target, journal.read(step), derived, journal=journal.digest(step + 1))
        if self.credit_to is None:
            check_same_credit(credit_path(self.run / "credit", step), credit_path(target, step))

    def _compare(self, learner: Learner, checkpoint: Path, rank: int) -> None:
        """Compares the learner's state with a checkpoint of the run."""
        directory = self.scratch / checkpoint.name
        learner.save(directory)
        if dist.is_initialized():
            dist.barrier()  # every rank has written its files
        if rank == 0:
            check_same_state(checkpoint, directory)
        if dist.is_initialized():
            dist.barrier()


def learner_of_run(
    cfg: Config, journal: Journal, start: Path | None, rank: int = 0, world: int = 1, rendezvous: str = ""
) -> Learner:
    """One rank of a run's learner, with the state of the checkpoint `start`; None: with the initial weights. Raises
    UserError if the checkpoint cannot be read."""
    transformers_logging.disable_progress_bar()
    first = 0 if start is None else int(start.name.removeprefix("step-"))
    critic_digest = identity(journal.notes, before_step=0).get("critic")
    learner = Learner(config_at(cfg, journal.notes, max(0, first - 1)), critic_digest=critic_digest)
    learner.join(rank, world, rendezvous)
    if start is not None:
        learner.restore(start)
    return learner


def learn_again(learner: Learner, cfg: Config, journal: Journal, step: int) -> dict[str, float]:
    """Learns or skips one step, with the settings that it was first learned with. Returns the metrics. Raises Violation
    for a batch that cannot be learned from."""
    entry = journal.read(step)
    if (settings := config_at(cfg, journal.notes, step)) != learner.cfg:
        learner.reconfigure(settings)
    if step in journal.voided:
        learner.skip()
        return {}
    try:
        return learner.update(entry.table)
    except BatchError as error:
        raise Violation("replay", f"step {step} cannot be learned from, and no note says so: {error}") from error
