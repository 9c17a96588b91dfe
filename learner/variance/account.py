"""The variance account of a run: how noisy the policy gradient is for its learner at one step, with each advantage
estimator. It is measured on batches that this learner has not learned from.

Runs in every rank of `ratchet evaluate --variance`. Nothing is generated, scored or learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from common.config.ppo import Config
from common.errors import UserError
from common.files import write_json
from common.metrics.step import StepMetrics
from learner.loop.changes import config_at
from learner.loop.journal import Journal
from learner.ppo.experience import ExperienceBatch
from learner.ppo.learner import Learner
from learner.ppo.scores import shaped_turns
from learner.ppo.targets import Targets, advantages_and_returns, targets
from learner.proof.ranks import write_progress
from learner.proof.replay import learn_again, learner_of_run
from learner.variance.estimators import NONE, UNBIASED, Estimator, estimators_of
from learner.variance.figures import Resampled, explained_account, variance_account
from learner.variance.gradients import Products, equal_parts, gradient_products
from learner.variance.noise import direction, noise, noise_against

MOST_PARTS = 16  # the interval needs several, and a part should have a few responses
FEWEST_PARTS = 4


@dataclass(frozen=True)
class VarianceAccount:
    """The batches to measure, and the learner to measure them with. This object is sent to every rank."""

    cfg: Config  # with the newest settings; those of each step come from the journal
    run: Path
    step: int  # updates that the learner has done
    batches: Sequence[int]  # steps of the journal, from `step` on
    start: Path | None  # the checkpoint to begin with; the steps between it and `step` are learned again
    result: Path  # where rank 0 writes the account as JSON
    progress: Path  # a file that gets how far the work is

    def __call__(self, rank: int = 0, world: int = 1, rendezvous: str = "") -> None:
        """One rank's part. Raises UserError for batches that give no account."""
        journal = Journal(self.run / "journal")
        learner = learner_of_run(self.cfg, journal, self.start, rank, world, rendezvous)
        first = learner.step
        for step in range(first, self.step):
            learn_again(learner, self.cfg, journal, step)
            self._tell(rank, "learning again", step + 1 - first, self.step - first)
        learner.optimizer.state.clear()  # nothing is learned from now on, and the sketches need the memory
        if (cfg := config_at(self.cfg, journal.notes, self.step)) != learner.cfg:
            learner.reconfigure(cfg)
        table = pa.concat_tables([journal.read(step).table for step in self.batches])
        found = account(learner, table, done=lambda parts, total: self._tell(rank, "gradients", parts, total))
        if rank == 0:
            write_json(self.result, found)

    def _tell(self, rank: int, work: str, done: int, total: int) -> None:
        if rank == 0:
            write_progress(self.progress, work, done, total)


def account(learner: Learner, table: pa.Table, *, done: Any = lambda parts, total: None) -> dict[str, Any]:
    """The figures of these rollouts, as JSON. `done` gets the parts done so far, and all."""
    batch = ExperienceBatch.from_table(table)
    groups, mask = batch.groups, batch.mask
    written = mask.any(1)
    parts = min(MOST_PARTS, len(groups[written].unique()))
    if parts < FEWEST_PARTS:
        raise UserError(
            f"the chosen batches have responses to {parts} prompts; --variance needs at least {FEWEST_PARTS}: choose "
            "more steps with --steps"
        )
    rows = torch.nonzero(written).flatten()  # a prompt whose responses are all empty is in no part
    estimators, left_out = estimators_of(learner.cfg.ppo, groups[rows])
    advantages, values, fixed, mismatch = _derived(learner, batch, estimators)
    returns = advantages[NONE].numpy()
    divided = [rows.numpy()[part] for part in equal_parts(groups[rows].numpy(), parts, seed=_seed(learner))]
    products = gradient_products(learner, batch, fixed, advantages, divided, done=lambda n: done(n, parts))
    if not np.isfinite(products.table).all():
        raise UserError("a gradient of these batches is not finite; choose others with --steps")
    resampled = Resampled(groups.numpy(), seed=_seed(learner))
    arrays = {name: found.numpy() for name, found in advantages.items()}
    of_returns, figures = variance_account(arrays, returns, mask.numpy(), resampled)
    explained = {}
    if learner.cfg.ppo.has_critic:
        explained = explained_account(values.numpy(), returns, mask.numpy(), resampled)
    for one in estimators:
        figures[one.name] = {"is_runs_own": one.is_runs_own, **figures[one.name], **_noise(products, one.name, rows)}
    return {
        "step": learner.step,
        "responses": len(rows),
        "prompts": len(groups[rows].unique()),
        "tokens": int(mask.sum()),
        "mismatch_kl": mismatch,
        "whitens": learner.cfg.ppo.whiten_advantages,
        "gradients": {"parts": parts, "weights": products.weights, "kept": products.kept},
        "returns": of_returns,
        "explained_variance": explained,
        "estimators": figures,
        "left_out": left_out,
    }


def _seed(learner: Learner) -> int:
    """The seed of parts and resamples: a repeated account gets the same ones."""
    return learner.cfg.seed + learner.step


def _noise(products: Products, name: str, rows: Tensor) -> dict[str, Any]:
    """The noise of the gradients of one estimator, whitened and not."""
    found: dict[str, Any] = {}
    for which, between in (("whitened", products.whitened), ("unwhitened", products.unwhitened)):
        own = between(name)
        found[which] = {**noise(own, len(rows)), "against_none": noise_against(own, between(NONE))}
        if UNBIASED in products.names:
            found[which]["direction"] = direction(own, between(UNBIASED), between(name, UNBIASED))
    return found


def _derived(
    learner: Learner, batch: ExperienceBatch, estimators: Sequence[Estimator]
) -> tuple[dict[str, Tensor], Tensor, Targets, float | None]:
    """The advantages of each estimator before whitening, the critic's values, the targets that all estimators share,
    and the KL from the policies that sampled, nats per token. The advantages without a baseline are the realised
    returns.

    Scores are normalised as in an update of this step, which first adds them to the running statistics.
    """
    old_logprobs, _, values, _ = learner.old_outputs(batch)
    scores = learner.shaped_scores(batch.scores, StepMetrics())
    # By the run's own estimator. Any other would do: rewards, ratio and its weights do not depend on it.
    shared, derivation, stats = targets(
        batch,
        old_logprobs,
        values,
        scores,
        kl_coef=learner.kl_controller.coef,
        kl_estimator=learner.cfg.kl.estimator,
        ppo=learner.cfg.ppo,
        turn_rewards=shaped_turns(batch.turn_rewards, learner.score_moments, learner.cfg.reward),
    )
    advantages = {one.name: advantages_and_returns(derivation.rewards, values, batch, one.ppo)[0] for one in estimators}
    return advantages, values, shared, stats.get("mismatch/kl")
