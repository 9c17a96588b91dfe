"""`ratchet evaluate --variance RUN`: the noise of the policy gradient with and without a critic.

Runs in a process of its own, and in one process for each rank if the run has several. It needs neither Ray nor vLLM:
the journal has the responses, their scores and their log-probabilities. The run may be active, finished or a copy. It
writes RUN/variance.json and RUN/variance.png.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import write_json
from deploy.journal_parts import chosen_steps
from deploy.replay import config_for_replay, newest_verified, refuse_other_directories
from deploy.screen.console import Output, complain
from deploy.screen.rank_bars import bars_of
from deploy.variance.plot import plot_account
from deploy.variance.record import RECORD
from deploy.variance.table import account_text
from learner.loop.checkpoints import Checkpoints
from learner.loop.journal import Journal
from learner.loop.notes import learns
from learner.proof.ranks import in_ranks
from learner.variance.account import VarianceAccount

PLOT = "variance.png"


def run_variance(
    run: Path,
    *,
    after: int | None = None,
    steps: str | None = None,
    model: str | None = None,
    critic: str | None = None,
    settings: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes the account into the run directory, and returns it.

    `after`: number of updates that the measured learner has done. `steps`: the batches, such as 10:14; left out, the
    first batch after these updates. `model`, `critic`, `settings`: as for `ratchet replay`. Raises UserError.
    """
    refuse_other_directories(run)
    if not os.access(run, os.W_OK | os.X_OK):
        raise UserError(f"{run} must be writable for {RECORD} and {PLOT}; change its permissions, or copy it")
    journal = Journal(run / "journal")
    if not learns(journal.notes):
        raise UserError(
            f"{run} has only responses of the starting policy (ratchet train-critic --sample); start a run from its "
            "critic (learner.critic_path), and measure that run with --after 0"
        )
    step, batches = choose(run, journal, after, steps)
    cfg = config_for_replay(run, journal, model, critic, settings)
    # A compiled layer keeps its graph for one backward pass only.
    cfg = cfg.model_copy(update={"learner": cfg.learner.model_copy(update={"compile": False})})
    start = newest_verified(run, journal, step, until=step)
    if start is None and step:
        complain(
            f"{run} has no checkpoint to begin with, so {step} {'step is' if step == 1 else 'steps are'} learned again "
            "from the journal; --after 0 measures the start of the run without that"
        )
    with tempfile.TemporaryDirectory(prefix="ratchet-variance-") as scratch:
        result, progress = Path(scratch) / RECORD, Path(scratch) / "progress"
        job = VarianceAccount(cfg, run, step, batches, start, result, progress)
        with bars_of(progress, "variance"):
            in_ranks(job, cfg.learner.ranks, gpus=cfg.learner.gpus, scratch=Path(scratch))
        found = json.loads(result.read_text(encoding="utf-8"))
    begun = None if start is None else start.name
    account = {"run": str(run.resolve()), "batches": batches, "checkpoint": begun, **found}
    write_json(run / RECORD, account)
    plot_account(account, run / PLOT)
    console = Output()
    for part in account_text(account):
        console.print(part)
    console.print(f"{run}: {RECORD}, {PLOT}", markup=False, soft_wrap=True)
    return account


def choose(run: Path, journal: Journal, after: int | None, steps: str | None) -> tuple[int, list[int]]:
    """The number of updates that the learner has done, and the batches to measure, which it has not learned from.

    By default `after` is the step of the newest checkpoint that is followed by a batch. Without such a checkpoint it is
    the step before the last usable batch, because a run's first policy and critic are not typical. Raises UserError."""
    count = journal.next_step
    usable = [number for number in range(count) if number not in journal.voided]
    if not usable:
        raise UserError(f"{journal.directory} has no batch; --variance needs one that the learner has not learned from")
    if steps is not None:
        return _chosen(run, usable, count, after, steps)
    if after is None:
        found = Checkpoints(run / "checkpoints", every=1, keep=1, journal=journal).steps()
        after = max((number for number in found if number <= usable[-1]), default=usable[-1])
    elif after > usable[-1]:
        raise UserError(
            f"--after ({after}): the journal has no batch that was written after {after} steps; its last one is of "
            f"step {usable[-1]}"
        )
    return after, [next(number for number in usable if number >= after)]


def _chosen(run: Path, usable: Sequence[int], count: int, after: int | None, steps: str) -> tuple[int, list[int]]:
    """As `choose`, with --steps. The first step defaults to `after`, or 0; `after` defaults to the first step."""
    chosen = chosen_steps(steps)
    first = chosen.start if chosen.start is not None else after if after is not None else 0
    end = count if chosen.stop is None else chosen.stop
    if not first < end <= count:
        raise UserError(f"--steps ({steps}) is not in the journal of {run}, which has {count} steps: 0:{count}")
    if after is None:
        after = first
    if first < after:
        raise UserError(
            f"--steps ({steps}) has batches that the learner of --after {after} has learned from, so its critic knows "
            f"their returns; begin with step {after}, or name an earlier --after"
        )
    batches = [number for number in usable if first <= number < end]
    if not batches:
        raise UserError(f"--steps ({steps}): every batch there is void; choose others")
    return after, batches
