"""The loop of reward training: all pairs in a new order each epoch, checkpoints, evaluations.

Runs in the driver.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.config.reward_model import RewardTrainingConfig
from common.errors import BatchError, UserError
from common.files import append_record
from learner.loop.checkpoints import Checkpoints, completed, restore_newest, save, save_now
from learner.loop.records import keep_sound_records
from learner.reward_model.calibration import PreferenceEvaluation, evaluate_preferences
from learner.reward_model.pairs import Pair, Pairs

PAIRS_PER_EVALUATION_CALL = 64


class Trainers(Protocol):
    """The group of trainer ranks, as the loop sees it. `learner.ranks.group.RewardTrainerGroup` implements
    it on Ray.

    Every call waits until all ranks have done it, and raises the error of the rank that failed.
    """

    @property
    def step(self) -> int:
        """Updates done."""

    async def update(self, pairs: Sequence[Pair]) -> dict[str, float]:
        """One optimizer step on the pairs, which the ranks share. Returns its metrics."""

    async def scores(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Scores of the chosen and the rejected side of each pair, float32 [N, 2]. Nothing is learned."""

    async def save(self, directory: Path) -> Mapping[str, str]:
        """Writes the files of a checkpoint, all but its marker. Returns the SHA-256 of each, by name."""

    async def restore(self, directory: Path) -> None:
        """Restores the state of a checkpoint; `step` is then the checkpoint's."""

    async def save_model(self, directory: Path) -> None:
        """Writes the reward model as a Hugging Face directory. Replaces an existing one."""


@dataclass
class RewardRun:
    """Everything a run of reward training is made of."""

    cfg: RewardTrainingConfig
    directory: Path
    pairs: Pairs
    heldout: Pairs
    trainer: Trainers
    on_step: Callable[[dict[str, Any]], None] = lambda record: None
    on_evaluation: Callable[[PreferenceEvaluation], None] = lambda evaluation: None
    report: Callable[[str], None] = lambda message: print(message, file=sys.stderr)  # about faults that were overcome
    checkpoints: Checkpoints = field(init=False)
    _order: tuple[int, np.ndarray] = field(init=False, default=(-1, np.empty(0)))  # (epoch, permutation)

    def __post_init__(self) -> None:
        checkpoint = self.cfg.checkpoint
        self.checkpoints = Checkpoints(self.directory / "checkpoints", every=checkpoint.every, keep=checkpoint.keep)

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.pairs), self.cfg)

    def batch(self, step: int) -> list[Pair]:
        """The pairs of one step. An epoch has every pair once, in an order that depends on seed and epoch alone."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.cfg.seed, 1, epoch]).permutation(len(self.pairs))
        size = self.cfg.pairs_per_step
        return [self.pairs[int(i)] for i in self._order[1][place * size : (place + 1) * size]]


def steps_per_epoch(num_pairs: int, cfg: RewardTrainingConfig) -> int:
    """The last step of an epoch may have fewer pairs than the others."""
    return -(-num_pairs // cfg.pairs_per_step)


async def train_reward_model(run: RewardRun) -> list[PreferenceEvaluation]:
    """Trains from the newest checkpoint, or from the start, to the last epoch. Evaluates after every epoch.

    Writes the model to RUN/model. Returns all evaluations of the run, oldest first.
    """
    trainer, num_steps = run.trainer, run.cfg.epochs * run.steps_per_epoch
    directory = run.directory
    await restore_newest(trainer, run.checkpoints, num_steps=num_steps, report=run.report)
    sound = keep_sound_records(directory / "evaluations.jsonl", _evaluation_fault, run.report)
    evaluations = [PreferenceEvaluation.from_record(record) for record in sound]
    sound = keep_sound_records(directory / "metrics.jsonl", _metrics_fault, run.report)
    logged = {record["step"] for record in sound}
    await _evaluate_if_due(run, evaluations)  # a crash may have come after the checkpoint and before the evaluation
    try:
        while trainer.step < num_steps:
            learning = _train_step(run, num_steps, logged)
            await (completed(learning) if run.cfg.checkpoint.on_signal else learning)
            await _evaluate_if_due(run, evaluations)
    except asyncio.CancelledError:
        if run.cfg.checkpoint.on_signal:
            await save_now(trainer, run.checkpoints)
        raise
    await trainer.save_model(run.directory / "model")
    if not run.cfg.checkpoint.keep_optimizer_at_end:
        await asyncio.to_thread(run.checkpoints.drop_optimizers)
    return evaluations


def _evaluation_fault(record: dict[str, Any]) -> str | None:
    try:
        PreferenceEvaluation.from_record(record)
    except (KeyError, TypeError, ValueError) as error:
        return f"no record of an evaluation ({type(error).__name__}: {error})"
    return None


def _metrics_fault(record: dict[str, Any]) -> str | None:
    return None if type(record.get("step")) is int else "the record of no step"


async def _train_step(run: RewardRun, num_steps: int, logged: Container[int]) -> None:
    """One optimizer step, its record, and a checkpoint if one is due."""
    trainer, step = run.trainer, run.trainer.step
    try:
        stats = await trainer.update(run.batch(step))
    except BatchError as error:
        raise UserError(
            f"the trainer cannot learn from the pairs of step {step + 1}: {error}. Look for absurd margins in the "
            "pairs, or begin a new run with a lower optimizer.learning_rate"
        ) from error
    record = {"step": step, "epoch": (step + 1) / run.steps_per_epoch, **stats}
    if step not in logged:  # a resumed run repeats the steps since its checkpoint, with the same result
        append_record(run.directory / "metrics.jsonl", {"time": time.time(), **record})
    run.on_step(record)
    if run.checkpoints.due(trainer.step, num_steps):
        await save(trainer, run.checkpoints)


async def _evaluate_if_due(run: RewardRun, evaluations: list[PreferenceEvaluation]) -> None:
    """At the end of an epoch, unless this epoch's evaluation is recorded already: scores the held-out pairs."""
    step = run.trainer.step
    if step == 0 or step % run.steps_per_epoch or not run.heldout or any(done.step == step for done in evaluations):
        return
    calls = range(0, len(run.heldout), PAIRS_PER_EVALUATION_CALL)
    scores = [
        await run.trainer.scores([run.heldout[i] for i in range(start, min(start + calls.step, len(run.heldout)))])
        for start in calls
    ]
    chosen, rejected = np.concatenate(scores).T
    evaluation = evaluate_preferences(chosen, rejected, step=step, epoch=step / run.steps_per_epoch)
    append_record(run.directory / "evaluations.jsonl", {"time": time.time(), **evaluation.record()})
    evaluations.append(evaluation)
    run.on_evaluation(evaluation)
