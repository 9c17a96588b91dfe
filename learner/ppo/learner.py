"""PPO on one rank: a batch of experience in, new weights and metrics out. Runs in every learner rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from common.config.ppo import Config
from common.errors import BrokenWeightsError
from common.metrics.step import StepMetrics
from learner.ppo.credit import Credit, NewestPass
from learner.ppo.critic_files import check_same, score_moments
from learner.ppo.experience import ExperienceBatch
from learner.ppo.kl_controller import kl_controller
from learner.ppo.objective import objective
from learner.ppo.policy_trainer import Outputs, PolicyTrainer, check_finite
from learner.ppo.scores import RunningMoments, shaped, shaped_turns
from learner.ppo.targets import Targets, targets
from learner.ppo.value_passes import train_critic_alone
from learner.ranks.rows import minibatches
from learner.ranks.trainer import read_together

OLD_LOGPROB = "a log-probability under the policy before the update"


class Learner(PolicyTrainer):
    """Trains the policy, and its critic if the advantages need one."""

    def __init__(self, cfg: Config, *, critic_digest: str | None = None) -> None:
        """`critic_digest`: that of learner.critic_path when the run began. Raises UserError if it has another now."""
        critic = None if cfg.critic_path is None else Path(cfg.critic_path)
        super().__init__(cfg, critic=critic)
        self.score_moments = RunningMoments() if critic is None else score_moments(critic)
        if critic is not None and critic_digest is not None:
            check_same(critic, critic_digest)
        self.kl_controller = kl_controller(cfg.kl)
        self._credit: Credit | None = None  # of the newest update, until `credit` has returned it

    def update(self, table: pa.Table) -> dict[str, float]:
        """One PPO step. Each rank takes its share of `table`. Returns the step's metrics, the same on every rank.

        Raises BatchError, on every rank, if a score, the loss or the gradient of a minibatch is not finite, before that
        minibatch changes a weight. Earlier minibatches may have changed some, so the weights must then be restored.
        """
        started, cfg, metrics, self._credit = time.perf_counter(), self.cfg, StepMetrics(), None
        batch = ExperienceBatch.from_table(table)
        if self.step > 0 and bool((batch.ref_is_policy & batch.mask.any(1)).any()):
            raise RuntimeError(f"step {self.step} has rollouts without ref_logprobs; only those of step 0 need none")
        check_finite("a total score, as float32,", batch.scores.float())
        old_logprobs, old_entropy, old_values, shared_pass = self.old_outputs(batch)
        scores = self.shaped_scores(batch.scores, metrics)
        fixed, derivation, stats = targets(
            batch,
            old_logprobs,
            old_values,
            scores,
            kl_coef=self.kl_controller.coef,
            kl_estimator=cfg.kl.estimator,
            ppo=cfg.ppo,
            turn_rewards=shaped_turns(batch.turn_rewards, self.score_moments, cfg.reward),
        )
        self.kl_controller.update(stats["kl/per_response"], len(batch.scores))
        forwarded = time.perf_counter()

        scale = self.set_learning_rate()
        newest = NewestPass(batch.mask.shape, self.device, entropy=old_entropy is None)
        steps = self._policy_passes(batch, fixed, shared_pass, newest, metrics)
        stats |= train_critic_alone(self, batch, fixed, metrics)

        self.ranks.merge(metrics)
        stats |= {
            "ppo/learning_rate": cfg.optimizer.learning_rate * scale,
            "ppo/optimizer_steps": steps,
            "learner/tokens": int(batch.sequences.lengths.sum()),
            "time/old_logprobs_s": forwarded - started,
            "time/optimise_s": time.perf_counter() - forwarded,
        }
        for key, value in stats.items():
            metrics.add(key, value)
        self._credit = Credit(fixed, derivation, old_entropy, newest, cfg.ppo)
        self.step += 1
        self.return_memory()
        return metrics.result()

    def credit(self) -> pa.Table | None:
        """The values of the newest update for each token, a table of DERIVED_SCHEMA: once after each update, on rank 0.
        The other ranks help to gather it, and return None."""
        if self._credit is None:
            raise RuntimeError(f"step {self.step} has no update whose values for each token are still there")
        table, self._credit = self._credit.table(self.ranks.sum), None
        return table if self.ranks.rank == 0 else None

    # State in addition to that of `Trainer`

    def reconfigure(self, cfg: Config) -> None:
        before, coef = self.cfg.kl, self.kl_controller.coef
        super().reconfigure(cfg)
        if cfg.kl != before:
            self.kl_controller = kl_controller(cfg.kl)
            if cfg.kl.coef == before.coef:  # an adaptive coefficient continues
                self.kl_controller.coef = coef

    def numbers(self) -> dict[str, Any]:
        return {"kl_coef": self.kl_controller.coef, "score_moments": asdict(self.score_moments)}

    def restore_numbers(self, numbers: dict[str, Any]) -> None:
        self.kl_controller.coef = numbers["kl_coef"]
        self.score_moments = RunningMoments(**numbers["score_moments"])

    # The stages of an update

    def old_outputs(self, batch: ExperienceBatch) -> tuple[Tensor | None, Tensor | None, Tensor, Outputs | None]:
        """Log-probabilities, entropy and values [B, R] before the update; values are zeros without a critic. The first
        two are None if the ratio divides by `rollout_logprobs`: then only the values need a pass.

        The last result is None unless one minibatch and one micro-batch hold the whole batch. The first optimizer step
        would then repeat this pass, so it gets the outputs of this pass with their graph.
        """
        to_sampler = self.cfg.ppo.ratio_to_sampler
        if to_sampler and not self.cfg.ppo.has_critic:
            return None, None, torch.zeros(batch.mask.shape), None
        micro_batches = self.share_of(batch.sequences, np.arange(len(batch.scores)))
        shared_pass = None
        if self.cfg.ppo.minibatches == 1 and len(micro_batches) == 1:
            shared_pass = self.outputs(batch.sequences, micro_batches[0])
        old = torch.zeros(3, *batch.mask.shape)
        with torch.no_grad():  # queue all passes before the first copy: every copy waits for the device
            if to_sampler and shared_pass is None:
                passes = [self.values(batch.sequences, rows)[None] for rows in micro_batches]
            else:
                passes = [_stacked(shared_pass or self.outputs(batch.sequences, rows)) for rows in micro_batches]
            for rows, outputs in zip(micro_batches, passes, strict=True):
                old[-len(outputs) :, rows, : outputs.shape[2]] = outputs.cpu()
        old_logprobs, old_entropy, old_values = self.ranks.sum(old)
        if not to_sampler:
            check_finite(OLD_LOGPROB, old_logprobs, BrokenWeightsError)
        check_finite("a value of the critic before the update", old_values, BrokenWeightsError)
        if to_sampler:
            return None, None, old_values, shared_pass
        return old_logprobs, old_entropy, old_values, shared_pass

    def shaped_scores(self, scores: Tensor, metrics: StepMetrics) -> Tensor:
        """Adds the batch to the running statistics, and returns its scores [B] normalised as configured, float32."""
        self.score_moments.update(scores)
        metrics.add("reward/running_mean", self.score_moments.mean)
        metrics.add("reward/running_std", self.score_moments.deviation)
        return shaped(scores, self.score_moments, self.cfg.reward)

    def _policy_passes(
        self,
        batch: ExperienceBatch,
        fixed: Targets,
        shared_pass: Outputs | None,
        newest: NewestPass,
        metrics: StepMetrics,
    ) -> int:
        """The passes over the batch that train the policy. They end early if it has moved too far (ppo.target_kl).
        Returns the optimizer steps."""
        ppo, steps = self.cfg.ppo, 0
        for rows in self._minibatches(len(batch.scores)):
            approx_kl, loss = self._minibatch_gradient(batch, fixed, rows, shared_pass, newest, metrics)
            shared_pass = None
            if ppo.ratio_to_sampler and steps == 0:  # only the first minibatch ran under the old weights
                check_finite(OLD_LOGPROB, approx_kl, BrokenWeightsError)
                metrics.add("mismatch/kl", float(approx_kl))
            check_finite("the loss", loss)
            if ppo.target_kl and approx_kl > ppo.target_kl:
                self.optimizer.zero_grad(set_to_none=True)
                break
            if self._critic_only:
                for parameter in self.network.policy.parameters():
                    parameter.grad = None
            metrics.add("ppo/grad_norm", self.optimizer_step())
            steps += 1
        return steps

    def _minibatch_gradient(
        self,
        batch: ExperienceBatch,
        fixed: Targets,
        rows: np.ndarray,
        shared_pass: Outputs | None,
        newest: NewestPass,
        metrics: StepMetrics,
    ) -> tuple[Tensor, Tensor]:
        """Adds the gradient of one minibatch. Returns its mean KL from the policy that the ratio divides by, nats per
        token, and its loss. Both may not be finite."""
        num_tokens = max(1, int(batch.mask[torch.from_numpy(rows)].sum()))
        newest.begin(rows)
        parts: list[tuple[int, dict[str, Tensor]]] = []  # tokens of each micro-batch, and its sums by metric key
        for chosen in self.share_of(batch.sequences, rows):
            logprobs, entropy, values = shared_pass or self.outputs(batch.sequences, chosen)
            part = fixed.rows(chosen, logprobs.shape[1], self.device)
            loss, sums = objective(
                logprobs, entropy, values, part, ppo=self.cfg.ppo, num_tokens=num_tokens, critic_only=self._critic_only
            )
            self.backward(loss)
            newest.add(chosen, logprobs, entropy)
            parts.append((int(fixed.mask[chosen].sum()), {**sums, "loss": loss.detach().double()}))
        kl_sum, loss_sum = torch.zeros(2, dtype=torch.float64)
        for count, numbers in read_together(parts):
            loss_sum += numbers.pop("loss")
            kl_sum += numbers["ppo/approx_kl"]
            for key, total in numbers.items():
                metrics.add(key, total, count)
        kl_sum, loss_sum = self.ranks.sum(torch.stack([kl_sum, loss_sum]))
        return kl_sum / num_tokens, loss_sum

    @property
    def _critic_only(self) -> bool:
        return self.step < self.cfg.critic_warmup_steps

    def _minibatches(self, count: int) -> Iterator[np.ndarray]:
        ppo = self.cfg.ppo
        return minibatches(count, epochs=ppo.ppo_epochs, parts=ppo.minibatches, seed=self.cfg.seed, step=self.step)


def _stacked(outputs: Outputs) -> Tensor:
    """The outputs as one tensor [3, b, r]; without a critic, zeros for values."""
    logprobs, entropy, values = outputs
    return torch.stack([logprobs, entropy, torch.zeros_like(logprobs) if values is None else values])
