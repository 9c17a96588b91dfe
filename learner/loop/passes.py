"""Training on the same rows in every pass: their order, records, checkpoints, evaluations. Runs in the driver.

`ratchet train-reward` (learner/reward_model/training.py) and `ratchet train-critic` (learner/critic/training.py) are
such trainings.
"""

from __future__ import annotations

import asyncio
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from common.config.training import CheckpointConfig
from common.errors import BatchError, UserError
from common.files import append_record
from learner.loop.checkpoints import Checkpoints, Saves, completed, restore_newest, save, save_now
from learner.loop.records import keep_sound_records


class Evaluation(Protocol):
    """An evaluation after `step` updates."""

    @property
    def step(self) -> int: ...

    def record(self) -> dict[str, Any]:
        """Its line in evaluations.jsonl, without the time."""


E = TypeVar("E", bound=Evaluation)


class Updates(Saves, Protocol):
    """The group of trainer ranks, as the loop sees it. Every call waits until all ranks have done it, and raises the
    error of the rank that failed."""

    async def update(self, batch: Any) -> dict[str, float]:
        """One optimizer step on the batch, which the ranks share. Returns its metrics."""


class RowOrder:
    """Which rows each step learns from: every row once in each pass, in an order that depends on seed and pass alone.
    The last step of a pass may have fewer rows than the others."""

    def __init__(self, rows: int, *, per_step: int, seed: int) -> None:
        self._rows, self._per_step, self._seed = rows, per_step, seed
        self.steps_per_pass = -(-rows // per_step)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))  # (pass, permutation)

    def of(self, step: int) -> list[int]:
        number, place = divmod(step, self.steps_per_pass)
        if self._order[0] != number:
            self._order = number, np.random.default_rng([self._seed, 1, number]).permutation(self._rows)
        return self._order[1][place * self._per_step : (place + 1) * self._per_step].tolist()


class PassTraining(ABC, Generic[E]):
    """A training that makes several passes over the same rows. A subclass says what a batch and an evaluation are."""

    ROWS = "rows"  # what the rows are, for messages
    SUSPECTS = "extreme numbers in the rows"  # what to look for when a batch cannot be learned from
    RATE = "optimizer.learning_rate"  # the setting that it learns with

    def __init__(
        self,
        directory: Path,
        trainer: Updates,
        order: RowOrder,
        *,
        passes: int,
        checkpoint: CheckpointConfig,
        on_step: Callable[[dict[str, Any]], None] = lambda record: None,
        on_evaluation: Callable[[Any], None] = lambda evaluation: None,
        report: Callable[[str], None] = lambda message: print(message, file=sys.stderr),
    ) -> None:
        """`report` gets sentences about faults that did not stop the training."""
        self.directory = directory
        self.order = order
        self.checkpoints = Checkpoints(directory / "checkpoints", every=checkpoint.every, keep=checkpoint.keep)
        self._trainer = trainer
        self._num_steps = passes * order.steps_per_pass
        self._saves_on_signal = checkpoint.on_signal
        self._on_step, self._on_evaluation, self._report = on_step, on_evaluation, report

    @abstractmethod
    def take(self, rows: Sequence[int]) -> Any:
        """The batch of these rows."""

    @abstractmethod
    async def evaluate(self, step: int, before: Sequence[E]) -> E | None:
        """The evaluation after `step` steps, at the end of a pass or before the first; None if there is none. `before`:
        all earlier ones."""

    @abstractmethod
    def evaluation_of(self, record: Mapping[str, Any]) -> E:
        """The evaluation that a line of evaluations.jsonl has. May raise KeyError, TypeError or ValueError."""

    def is_over(self, evaluations: Sequence[E]) -> bool:
        """True if these evaluations end the training before its last pass."""
        return False

    def batch(self, step: int) -> Any:
        """The batch of one step."""
        return self.take(self.order.of(step))

    async def train(self) -> list[E]:
        """Trains from the newest checkpoint, or from the start, to the end. Returns all evaluations of the run, oldest
        first."""
        trainer = self._trainer
        await restore_newest(trainer, self.checkpoints, num_steps=self._num_steps, report=self._report)
        sound = keep_sound_records(self.directory / "evaluations.jsonl", self._evaluation_fault, self._report)
        evaluations = [self.evaluation_of(record) for record in sound]
        sound = keep_sound_records(self.directory / "metrics.jsonl", _metrics_fault, self._report)
        logged = {record["step"] for record in sound}
        await self._evaluate_if_due(evaluations)  # a crash may have come after the checkpoint and before the evaluation
        try:
            while trainer.step < self._num_steps and not self.is_over(evaluations):
                learning = self._train_step(logged)
                await (completed(learning) if self._saves_on_signal else learning)
                await self._evaluate_if_due(evaluations)
        except asyncio.CancelledError:
            if self._saves_on_signal:
                await save_now(trainer, self.checkpoints)
            raise
        return evaluations

    async def _train_step(self, logged: Container[int]) -> None:
        """One optimizer step, its record, and a checkpoint if one is due."""
        trainer, step = self._trainer, self._trainer.step
        try:
            stats = await trainer.update(self.batch(step))
        except BatchError as error:
            raise UserError(
                f"the trainer cannot learn from the {self.ROWS} of step {step + 1}: {error}. Look for {self.SUSPECTS}, "
                f"or begin a new run with a lower {self.RATE}"
            ) from error
        record = {"step": step, "epoch": (step + 1) / self.order.steps_per_pass, **stats}
        if step not in logged:  # a resumed run repeats the steps since its checkpoint, with the same result
            append_record(self.directory / "metrics.jsonl", {"time": time.time(), **record})
        self._on_step(record)
        if self.checkpoints.due(trainer.step, self._num_steps):
            await save(trainer, self.checkpoints)

    async def _evaluate_if_due(self, evaluations: list[E]) -> None:
        """Evaluates before the first pass and after each pass, unless this evaluation is recorded already."""
        step = self._trainer.step
        if step % self.order.steps_per_pass or any(done.step == step for done in evaluations):
            return
        if (evaluation := await self.evaluate(step, evaluations)) is not None:
            append_record(self.directory / "evaluations.jsonl", {"time": time.time(), **evaluation.record()})
            evaluations.append(evaluation)
            self._on_evaluation(evaluation)

    def _evaluation_fault(self, record: dict[str, Any]) -> str | None:
        try:
            self.evaluation_of(record)
        except (KeyError, TypeError, ValueError) as error:
            return f"not the record of an evaluation ({type(error).__name__}: {error})"
        return None


def _metrics_fault(record: dict[str, Any]) -> str | None:
    return None if type(record.get("step")) is int else "not the record of a step"
