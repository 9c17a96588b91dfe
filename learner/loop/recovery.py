"""Brings the learner to the end of the journal, whatever it has lost. Runs in the driver.

The journal is the log, and a checkpoint is only a cache of it. `bring_to_end` restores the newest intact checkpoint,
and learns every later step again from the journal, without generating anything. One function does this for a resumed
run, for a new batch, after the death of a rank, and after a batch that led to numbers that are not finite:

    state   the learner has ...                                       next
    ready   the weights of its step                                   it learns or skips the next step of the journal
    new     the initial weights                                       the newest checkpoint is restored, if there is one
    torn    partly updated weights, after a batch failed half-way     the same; without a checkpoint it is `lost`
    lost    lost a rank                                               a new group of ranks is started, and is `new`
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from enum import Enum, auto
from functools import partial
from typing import TypeVar

from common.errors import BatchError, BrokenWeightsError, RankLostError, RoleError, UserError
from learner.loop.changes import config_at
from learner.loop.checkpoints import restore_newest, save_now
from learner.loop.evaluation import Evaluation, best_version
from learner.loop.notes import identity
from learner.loop.records import fill_gaps, record_of, sound_evaluations, sound_metrics
from learner.loop.run import Run

T = TypeVar("T")

MOST_VOIDS = 3  # in a row; the run then stops


class State(Enum):
    """The state of the learner: see the table above."""

    READY = auto()
    NEW = auto()
    TORN = auto()
    LOST = auto()


async def recover(run: Run) -> list[Evaluation]:
    """Brings the learner of a new or resumed run to the end of its journal, and sends its weights to the generators.
    Returns the evaluations that the run has made."""
    run.doing = lambda: "the journal is checked"
    run.journal.open_for_writing()
    await asyncio.to_thread(run.journal.verify)
    await asyncio.to_thread(run.credit.check)
    metrics = run.directory / "metrics.jsonl"
    run.logged = sound_metrics(metrics, run.journal, run.report)
    evaluations = sound_evaluations(run.directory / "evaluations.jsonl", run.journal, run.report)
    run.read_health()
    if run.cfg.checkpoint.best:
        run.checkpoints.best = best_version(evaluations)
    await bring_to_end(run, State.NEW)
    if fill_gaps(metrics, run.journal, run.logged):
        run.read_health()
    await asyncio.to_thread(run.checkpoints.prune)
    if (last := run.journal.last()) is not None:
        run.prompts.restore(last.prompts)
    # A new run loads its initial weights too: if engines cannot take new weights, it fails before anything is learned.
    await with_learner(run, partial(publish, run))
    return evaluations


async def publish(run: Run) -> dict[str, float]:
    """Brings the learner's weights to every generator. Returns the metrics `weights/*`."""
    return await run.generators.load(run.learner.publish(), run.learner.step)


async def with_learner(run: Run, call: Callable[[], Awaitable[T]], *, live: int | None = None) -> T:
    """The result of a call that needs the learner. If a rank is lost during it, the learner recovers, and the call is
    made again. `live`: see `bring_to_end`."""
    while True:
        try:
            return await call()
        except RankLostError as error:
            _count_loss(run, error)
            await bring_to_end(run, State.LOST, live=live)


async def without_learner(run: Run, work: Awaitable[T]) -> T:
    """The result of work that does not need the learner. If a rank is lost meanwhile, the learner recovers at once, and
    the work continues."""
    task, doing = asyncio.ensure_future(work), run.doing
    try:
        while True:
            try:
                return await run.learner.unless_lost(asyncio.shield(task))
            except RankLostError as error:
                _count_loss(run, error)
                await bring_to_end(run, State.LOST)
                run.doing = doing
    finally:
        task.cancel()


async def bring_to_end(run: Run, state: State = State.READY, *, live: int | None = None) -> dict[str, float]:
    """Learns or skips every step of the journal that the learner has not done. Returns the metrics of the newest of
    these steps; {} if there are none.

    `live` is a step that the caller logs: its record needs more than the journal has. Raises UserError if too many
    batches in a row cannot be learned from, and RoleError if ranks are lost again and again.
    """
    stats: dict[str, float] = {}
    while True:
        step = run.learner.step
        try:
            if state is State.LOST:
                run.doing = lambda: "the ranks of the learner are started again"
                await run.learner.rebuild()
                run.configured, state = run.cfg, State.NEW
            if state is not State.READY:
                if not await _restore(run):
                    if state is State.TORN:
                        state = State.LOST
                        continue
                    _check_initial_weights(run)
                state = State.READY
                continue
            if step >= run.journal.next_step:
                break
            stats = await _advance(run, step, live=live)
        except BatchError as error:
            _void(run, step, error)
            state = State.TORN
        except RankLostError as error:
            _count_loss(run, error)
            state = State.LOST
    if run.cfg.lent_share:
        await run.generators.wake()
    return stats


async def _advance(run: Run, step: int, *, live: int | None) -> dict[str, float]:
    """Learns or skips one step. If it is not `live`, logs it unless it is logged already, and saves a checkpoint if one
    is due and missing. Returns the metrics."""
    entry, reason = run.journal.read(step), run.journal.voided.get(step)
    if step != live:
        run.doing = partial("step {} is learned again from the journal".format, step + 1)
    # Also before a void step: a checkpoint after it has the settings of this step, and so has the restored learner.
    await _configure(run, step)
    if reason is None:
        if run.cfg.lent_share:
            await run.generators.sleep()
        stats = await run.learner.update(entry.table)
        if run.credit.due(step):
            with run.phase("credit", f"step {step + 1}: the values of its tokens are written"):
                await asyncio.to_thread(run.credit.write, entry, await run.learner.credit())
    else:
        await run.learner.skip()
        stats = {"ppo/optimizer_steps": 0.0}
    if run.learner.step > run.furthest:
        run.furthest, run.losses = run.learner.step, 0
    if step != live:
        if step not in run.logged:
            run.log(record_of(entry, stats))
        if run.checkpoints.due(step + 1, run.cfg.num_steps) or step + 1 == run.checkpoints.best:
            await save_now(run.learner, run.checkpoints)
    return stats


async def _restore(run: Run) -> bool:
    """Restores the newest sound checkpoint. Returns False if there is none."""

    async def prepare(step: int) -> None:
        run.doing = lambda: f"the checkpoint of step {step} is restored"
        await _configure(run, step - 1)

    run.doing = lambda: "the checkpoints are checked"
    return await restore_newest(
        run.learner,
        run.checkpoints,
        num_steps=run.cfg.num_steps,
        report=run.report,
        prepare=prepare,
    )


def _check_initial_weights(run: Run) -> None:
    """Raises UserError if the learner has initial weights from other files of the model than the journal's steps
    began with."""
    begun, now = (identity(run.journal.notes, before_step=step).get("model") for step in (0, None))
    if begun != now and run.journal.next_step > 0:
        raise UserError(
            f"{run.directory} has no checkpoint to continue from, and its {run.journal.next_step} steps cannot be "
            f"learned again from model.path ({run.cfg.model.path}): the run began with other files of the "
            f"model (SHA-256 {str(begun)[:12]}; --accept model replaced them). Restore a checkpoint, or restore those "
            "files and continue with --accept model"
        )


async def _configure(run: Run, step: int) -> None:
    """Gives the learner the settings that a step is learned with."""
    cfg = config_at(run.cfg, run.journal.notes, step)
    if cfg != run.configured:
        await run.learner.reconfigure(cfg)
        run.configured = cfg


def _void(run: Run, step: int, error: BatchError) -> None:
    """Voids the batch that caused the error: the journal records that it is never learned from. It is the batch of
    `step` or, if the weights were broken before, the newest one learned from. Raises UserError after too many."""
    cause, voided = step, run.journal.voided
    if isinstance(error, BrokenWeightsError):
        cause = next((earlier for earlier in reversed(range(step)) if earlier not in voided), -1)
        if cause < 0:
            raise UserError(f"the first step cannot be trained: {error}; use another model.path or learner.critic_path")
    run.journal.void(cause, f"{error}, at step {step + 1}" if cause != step else str(error))
    run.credit.remove(cause)
    run.report(f"nothing is learned from the batch of step {cause + 1}: {run.journal.voided[cause]}")
    row = _consecutive_voids(run, cause)
    if len(row) >= MOST_VOIDS:
        reasons = "; ".join(f"step {number + 1}: {run.journal.voided[number]}" for number in row)
        raise UserError(
            f"the learner could not learn from {len(row)} batches in a row ({reasons}). Continue with other settings, "
            "such as --change optimizer.learning_rate=... or --change kl.coef=..., or look for wrong scores in the "
            "journal"
        )


def _consecutive_voids(run: Run, step: int) -> list[int]:
    """The steps in a row around this one whose batches are void, since a setting last changed (--change)."""
    voided, first, end = run.journal.voided, step, step + 1
    changed = max((note.before_step for note in run.journal.notes if note.kind == "change"), default=0)
    while first - 1 in voided and first - 1 >= changed:
        first -= 1
    while end in voided:
        end += 1
    return list(range(first, end))


def _count_loss(run: Run, error: RankLostError) -> None:
    run.losses += 1
    if run.losses >= run.cfg.learner.max_losses:
        raise RoleError(
            f"the learner lost ranks {run.losses} times without finishing a step (step {run.learner.step + 1}); the "
            f"last time: {error}. The batch may need more memory than there is (learner.micro_batch_tokens); look for "
            "the cause in RUN/log.txt, and continue with --resume (learner.max_losses allows more)"
        ) from error
    run.report(f"{error}; the learner starts again from its checkpoint and the journal")
