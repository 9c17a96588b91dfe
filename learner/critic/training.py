"""The loop of `ratchet train-critic`: passes over the rollouts of journals, until the critic improves no more on
held-out prompts.

Runs in the driver. learner/loop/passes.py has the loop itself.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from torch import Tensor

from common.config.ppo import Config
from common.errors import UserError
from common.files import sync
from learner.critic.evaluation import CriticEvaluation, Predicted, best_of, evaluate_critic
from learner.critic.returns import realised_returns
from learner.critic.rollouts import Rollouts
from learner.loop.passes import PassTraining, RowOrder, Updates
from learner.ppo.critic_files import CriticBasis, TrainedCritic, read_critic
from learner.ppo.experience import ExperienceBatch

CRITIC = "critic"  # the directory in RUN with the result: it appears at the end, complete
BEST = "best-critic"  # the best critic so far; at the end it becomes CRITIC
ROLLOUTS_PER_CALL = 64


class Trainers(Updates, Protocol):
    """The group of trainer ranks. `learner.ranks.group.CriticTrainerGroup` implements it on Ray."""

    async def remember(self, table: pa.Table) -> None:
        """For a shared trunk: computes the states of these rollouts, which later calls reuse."""

    async def values(self, table: pa.Table) -> np.ndarray:
        """Values of every response token, float32 [B, R]. Nothing is learned."""

    async def save_critic(self, target: Path, record: TrainedCritic) -> None:
        """Writes the critic. Replaces an existing directory."""


@dataclass(frozen=True)
class CriticData:
    """The rollouts of a training: which are learned from, which are held out, and their returns."""

    cfg: Config
    rollouts: Rollouts
    rows: np.ndarray  # int64: rollouts to learn from
    heldout: np.ndarray  # int64

    @classmethod
    def split(cls, cfg: Config, rollouts: Rollouts) -> CriticData:
        """Raises UserError if there is only one prompt."""
        return cls(cfg, rollouts, *rollouts.split(cfg.critic_training.heldout_share, seed=cfg.seed))

    @property
    def order(self) -> RowOrder:
        return RowOrder(len(self.rows), per_step=self.cfg.rollouts_per_step, seed=self.cfg.seed)

    @property
    def num_steps(self) -> int:
        """Most steps."""
        return self.cfg.critic_training.passes * self.order.steps_per_pass

    def returns(self, table: pa.Table) -> tuple[Tensor, Tensor, Tensor]:
        """Scores [B] as a learner sees them, realised returns [B, R] and the mask of these rollouts."""
        cfg, batch = self.cfg, ExperienceBatch.from_table(table)
        moments = self.rollouts.moments
        scores, returns = realised_returns(batch, moments, reward=cfg.reward, kl=cfg.kl, gamma=cfg.ppo.gamma)
        return scores, returns, batch.mask

    def check_returns(self) -> None:
        """Raises UserError if no critic could explain anything: if all returns of the held-out rollouts are equal."""
        known: set[float] = set()
        for table in self.rollouts.chunks(self.heldout, ROLLOUTS_PER_CALL):
            _, returns, mask = self.returns(table)
            known |= set(returns[mask].unique().tolist())
            if len(known) > 1:
                return
        what = f"all returns are {known.pop():g}" if known else "all responses are empty"
        raise UserError(
            f"there is nothing that a critic could explain: in the {len(self.heldout)} held-out rollouts {what}; use "
            "journals with different scores (--from, --steps), or hold out more prompts (critic_training.heldout_share)"
        )


class CriticRun(PassTraining[CriticEvaluation]):
    """A training of a critic. It evaluates before the first pass and after every pass, and writes the critic whenever
    it is better than all before."""

    ROWS = "rollouts"
    SUSPECTS = "extreme scores in the journals"

    def __init__(
        self,
        data: CriticData,
        directory: Path,
        trainer: Trainers,
        basis: CriticBasis,
        *,
        on_progress: Callable[[str, int, int], None] = lambda work, done, total: None,
        **callbacks: Any,
    ) -> None:
        """`on_progress` gets a name for the work, the number of rollouts done, and the number of all. `callbacks`:
        those of PassTraining."""
        cfg = data.cfg
        passes, checkpoint = cfg.critic_training.passes, cfg.checkpoint
        super().__init__(directory, trainer, data.order, passes=passes, checkpoint=checkpoint, **callbacks)
        self.cfg, self.data, self.rollouts, self.trainer, self.basis = cfg, data, data.rollouts, trainer, basis
        self._on_progress = on_progress
        self.RATE = learning_rates(cfg)

    def take(self, rows: Sequence[int]) -> pa.Table:
        return self.rollouts.table(self.data.rows[np.asarray(rows)])

    async def evaluate(self, step: int, before: Sequence[CriticEvaluation]) -> CriticEvaluation:
        evaluation = await self._evaluation(step)
        done = [*before, evaluation]
        if best_of(done) is evaluation:  # save first: once it is recorded, it is not repeated
            passes = [one.record() for one in done]
            record = TrainedCritic(self.basis, self.rollouts.moments, self.rollouts.records(), passes)
            await self.trainer.save_critic(self.directory / BEST, record)
        return evaluation

    async def _evaluation(self, step: int) -> CriticEvaluation:
        parts = []
        for table in self._chunks("held-out prompts", self.data.heldout):
            scores, returns, mask = self.data.returns(table)
            values = await self.trainer.values(table)
            parts.append(Predicted.of(values, returns.numpy(), scores.numpy(), mask.numpy()))
        return evaluate_critic(parts, step=step, epoch=step / self.order.steps_per_pass)

    def evaluation_of(self, record: Mapping[str, Any]) -> CriticEvaluation:
        return CriticEvaluation.from_record(record)

    def is_over(self, evaluations: Sequence[CriticEvaluation]) -> bool:
        """True after `critic_training.patience` passes without a higher R2."""
        without = len(evaluations) - 1 - evaluations.index(best_of(evaluations))
        return without >= self.cfg.critic_training.patience

    async def remember(self) -> None:
        """For a shared trunk: lets the ranks compute the states of all rollouts. The same rollouts are always computed
        together, so that a resumed training gets the same bits."""
        if self.cfg.learner.critic == "shared":
            for table in self._chunks("states of the trunk", np.arange(len(self.rollouts))):
                await self.trainer.remember(table)

    def _chunks(self, work: str, rows: np.ndarray) -> Iterator[pa.Table]:
        """The rollouts at `rows` for the calls of some work. Reports the progress."""
        for number, table in enumerate(self.rollouts.chunks(rows, ROLLOUTS_PER_CALL)):
            self._on_progress(work, number * ROLLOUTS_PER_CALL, len(rows))
            yield table
        self._on_progress(work, len(rows), len(rows))


def learning_rates(cfg: Config) -> str:
    """The settings with the learning rates of this critic, for messages."""
    network = "optimizer.critic_learning_rate or " if cfg.learner.critic == "separate" else ""
    return f"{network}optimizer.value_head_learning_rate"


async def train_critic(run: CriticRun) -> list[CriticEvaluation]:
    """Trains to the end. RUN/critic has the best critic then. Returns all evaluations of the run."""
    await run.remember()
    evaluations = await run.train()
    keep_best(run.directory)
    read_critic(run.directory / CRITIC)  # raises an error if it cannot be read
    if not run.cfg.checkpoint.keep_optimizer_at_end:
        await asyncio.to_thread(run.checkpoints.drop_optimizers)
    return evaluations


def keep_best(directory: Path) -> None:
    """Makes the best critic of this training the result. If a continued run found no better one in its new passes, the
    earlier result stays."""
    if not (directory / BEST).exists():
        return
    old = directory / f".{CRITIC}-replaced-old"  # after a kill, deploy/run/leftovers.py restores or removes it
    if (directory / CRITIC).exists():
        (directory / CRITIC).rename(old)
    (directory / BEST).rename(directory / CRITIC)
    sync(directory)
    shutil.rmtree(old, ignore_errors=True)
