"""The loop of reward training: all pairs in a new order each epoch, checkpoints, evaluations.

Runs in the driver. learner/loop/passes.py has the loop itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.config.reward_model import RewardTrainingConfig
from learner.loop.passes import PassTraining, RowOrder, Updates
from learner.reward_model.calibration import PreferenceEvaluation, evaluate_preferences
from learner.reward_model.pairs import Pair, Pairs

PAIRS_PER_EVALUATION_CALL = 64


class Trainers(Updates, Protocol):
    """The group of trainer ranks. `learner.ranks.group.RewardTrainerGroup` implements it on Ray."""

    async def scores(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Scores of the chosen and the rejected side of each pair, float32 [N, 2]. Nothing is learned."""

    async def save_model(self, directory: Path) -> None:
        """Writes the reward model as a Hugging Face directory. Replaces an existing one."""


class RewardRun(PassTraining[PreferenceEvaluation]):
    """A run of reward training. It evaluates after every epoch."""

    ROWS = "pairs"
    SUSPECTS = "extreme margins in the pairs"

    def __init__(
        self,
        cfg: RewardTrainingConfig,
        directory: Path,
        pairs: Pairs,
        heldout: Pairs,
        trainer: Trainers,
        **callbacks: Any,
    ) -> None:
        """`callbacks`: those of PassTraining."""
        order = RowOrder(len(pairs), per_step=cfg.pairs_per_step, seed=cfg.seed)
        super().__init__(directory, trainer, order, passes=cfg.epochs, checkpoint=cfg.checkpoint, **callbacks)
        self.cfg, self.pairs, self.heldout, self.trainer = cfg, pairs, heldout, trainer

    def take(self, rows: Sequence[int]) -> list[Pair]:
        return [self.pairs[row] for row in rows]

    async def evaluate(self, step: int, before: Sequence[PreferenceEvaluation]) -> PreferenceEvaluation | None:
        """Scores the held-out pairs, if there are any."""
        if step == 0 or not self.heldout:
            return None
        calls = range(0, len(self.heldout), PAIRS_PER_EVALUATION_CALL)
        scores = [
            await self.trainer.scores(
                [self.heldout[i] for i in range(start, min(start + calls.step, len(self.heldout)))]
            )
            for start in calls
        ]
        chosen, rejected = np.concatenate(scores).T
        return evaluate_preferences(chosen, rejected, step=step, epoch=step / self.order.steps_per_pass)

    def evaluation_of(self, record: Mapping[str, Any]) -> PreferenceEvaluation:
        return PreferenceEvaluation.from_record(record)


def steps_per_epoch(num_pairs: int, cfg: RewardTrainingConfig) -> int:
    """Steps of an epoch. The last one may have fewer pairs than the others."""
    return RowOrder(num_pairs, per_step=cfg.pairs_per_step, seed=cfg.seed).steps_per_pass


async def train_reward_model(run: RewardRun) -> list[PreferenceEvaluation]:
    """Trains to the last epoch, and writes the model to RUN/model. Returns all evaluations of the run."""
    evaluations = await run.train()
    await run.trainer.save_model(run.directory / "model")
    if not run.cfg.checkpoint.keep_optimizer_at_end:
        await asyncio.to_thread(run.checkpoints.drop_optimizers)
    return evaluations
