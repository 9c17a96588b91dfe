"""One PPO step on one rank: a batch of experience in, new weights and what happened out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from common.config import Config
from common.masking import masked_mean, masked_sum, masked_var, whiten
from common.metrics import Metrics
from common.models import checkpoint_activations, find_device, load_policy, resolve_model, save_policy
from common.sequences import token_batches
from common.weights import Bucket, buckets
from learner.advantages import gae
from learner.checkpoint import load_checkpoint, save_checkpoint
from learner.experience import ExperienceBatch
from learner.losses import entropy_bonus, importance_weights, policy_loss, value_loss
from learner.optimizer import learning_rate_scale, make_optimizer, set_learning_rate
from learner.policy import PolicyWithCritic
from learner.shaping import (
    KL_ESTIMATORS,
    AdaptiveKL,
    FixedKL,
    KLController,
    RunningMoments,
    normalise,
    token_rewards,
)


@dataclass(frozen=True)
class Targets:
    """What an update holds fixed while it runs over the batch, all [B, R]."""

    mask: Tensor
    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    importance: Tensor  # weights that correct for the sampler; 1 where none are wanted

    def rows(self, rows: Tensor, width: int, device: torch.device) -> Targets:
        """The given rows, cut to `width`, on the device."""
        return Targets(*(getattr(self, field.name)[rows, :width].to(device) for field in fields(self)))


class Learner:
    """Holds policy, critic and optimizer. Its state after step s is a function of the config, the initial weights and
    the batches 0..s: nothing else is random here."""

    def __init__(self, cfg: Config, *, network: PolicyWithCritic | None = None) -> None:
        torch.set_num_threads(cfg.learner.threads)
        self.cfg = cfg
        self.step = 0  # updates done
        self.device = find_device(cfg.learner.gpus)
        self.network = network or load_network(cfg, self.device)
        self.optimizer = make_optimizer(self.network.parts(cfg.optimizer), cfg.optimizer)
        self.score_moments = RunningMoments()
        self.kl_controller: KLController = (
            AdaptiveKL(cfg.kl.coef, cfg.kl.target, cfg.kl.horizon)
            if cfg.kl.controller == "adaptive"
            else FixedKL(cfg.kl.coef)
        )

    @property
    def policy_version(self) -> int:
        """Every update publishes once."""
        return self.step

    def update(self, table: pa.Table) -> dict[str, float]:
        """One PPO step on `table`; returns its metrics."""
        started = time.perf_counter()
        metrics = Metrics()
        batch = ExperienceBatch.from_table(table)
        targets = self._targets(batch, metrics)
        forwarded = time.perf_counter()

        scale = learning_rate_scale(self.step, self.cfg.num_steps, self.cfg.optimizer)
        set_learning_rate(self.optimizer, scale)
        metrics.last("ppo/learning_rate", self.cfg.optimizer.learning_rate * scale)
        self._optimise(batch, targets, metrics)

        metrics.last("learner/tokens", int(batch.sequences.lengths.sum()))
        metrics.last("time/old_logprobs_s", forwarded - started)
        metrics.last("time/optimise_s", time.perf_counter() - forwarded)
        self.step += 1
        return metrics.result()

    def join(self, rank: int, world: int, rendezvous: str) -> int:
        """Called once by the group; returns the updates behind it. There is one rank as yet."""
        return self.step

    def publish(self) -> Iterator[Bucket | int]:
        """The policy's weights bucket by bucket, each followed by its number: a caller may wait for the number and
        pass the bucket on unseen."""
        for bucket in buckets(self.network.policy_tensors(), self.policy_version):
            yield bucket
            yield bucket.index

    def save(self, directory: Path) -> None:
        save_checkpoint(directory, self._state())

    def restore(self, directory: Path) -> int:
        """Restores a saved state; returns the updates it has behind it."""
        state = load_checkpoint(directory)
        self.step = state["step"]
        self.kl_controller.coef = state["kl_coef"]
        self.score_moments = RunningMoments(**state["score_moments"])
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        return self.step

    def save_policy(self, directory: Path) -> None:
        """The policy as a Hugging Face directory."""
        save_policy(self.network.policy, resolve_model(self.cfg.model.path), directory)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "kl_coef": self.kl_controller.coef,
            "score_moments": asdict(self.score_moments),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def _targets(self, batch: ExperienceBatch, metrics: Metrics) -> Targets:
        """Old log-probabilities and values, rewards, GAE, whitening, over the whole batch."""
        cfg, mask = self.cfg.ppo, batch.mask
        old_logprobs, old_values = torch.zeros_like(batch.ref_logprobs), torch.zeros_like(batch.ref_logprobs)
        with torch.no_grad():
            for rows in self._micro_batches(batch, np.arange(len(mask))):
                logprobs, _, values = self._forward(batch, rows)
                old_logprobs[rows, : logprobs.shape[1]] = logprobs.cpu()
                old_values[rows, : values.shape[1]] = values.cpu()
        kl = KL_ESTIMATORS[self.cfg.kl.estimator](old_logprobs, batch.ref_logprobs)
        rewards = token_rewards(self._shaped_scores(batch.scores, metrics), kl, mask, kl_coef=self.kl_controller.coef)
        advantages, returns = gae(rewards, old_values, mask, gamma=cfg.gamma, lam=cfg.lam)

        kl_per_response = float(masked_sum(kl, mask)) / len(mask)
        metrics.last("kl/coef", self.kl_controller.coef)
        metrics.mean("kl/per_token", float(masked_sum(kl, mask)), int(mask.sum()))
        metrics.last("kl/per_response", kl_per_response)
        self.kl_controller.update(kl_per_response, len(mask))
        returns_var = float(masked_var(returns, mask))
        unexplained = float(masked_var(returns - old_values, mask))
        metrics.last("value/mean", float(masked_mean(old_values, mask)))
        metrics.last("value/returns_var", returns_var)
        advantages_var = float(masked_var(advantages, mask))
        metrics.last("value/advantages_var", advantages_var)
        metrics.last("value/variance_ratio", advantages_var / returns_var if returns_var else 0.0)
        metrics.last("value/explained_variance", 1 - unexplained / returns_var if returns_var else 0.0)

        importance, mismatch = importance_weights(
            old_logprobs, batch.rollout_logprobs, mask, cap=cfg.importance_cap or math.inf
        )
        metrics.mean("mismatch/kl", mismatch["mismatch_kl"].item(), int(mask.sum()))
        metrics.mean("mismatch/capped", mismatch["capped"].item(), int(mask.sum()))
        return Targets(
            mask,
            old_logprobs,
            old_values,
            whiten(advantages, mask) if cfg.whiten_advantages else advantages,
            returns,
            importance if cfg.importance_cap else torch.ones_like(importance),
        )

    def _shaped_scores(self, scores: Tensor, metrics: Metrics) -> Tensor:
        """Scores [B] as the configured normalisation has them, float32, after the batch has joined the statistics."""
        cfg = self.cfg.reward
        self.score_moments.update(scores)
        metrics.last("reward/running_mean", self.score_moments.mean)
        metrics.last("reward/running_std", self.score_moments.deviation)
        if cfg.normalise == "none":
            return scores.float()
        return normalise(scores, self.score_moments, centre=cfg.normalise == "mean_std", clip=cfg.clip)

    def _optimise(self, batch: ExperienceBatch, targets: Targets, metrics: Metrics) -> None:
        """ppo_epochs x minibatches optimizer steps, ended early by target_kl."""
        target_kl, done = self.cfg.ppo.target_kl, 0
        for minibatch in self._minibatches(len(batch.mask)):
            approx_kl = self._backward(batch, targets, minibatch, metrics)
            if target_kl and approx_kl > target_kl:
                self.optimizer.zero_grad(set_to_none=True)
                break
            self._optimizer_step(metrics)
            done += 1
        metrics.last("ppo/optimizer_steps", done)

    def _backward(self, batch: ExperienceBatch, targets: Targets, minibatch: np.ndarray, metrics: Metrics) -> float:
        """Gradient of the loss on one minibatch; returns its mean KL from the old policy, nats per token."""
        cfg = self.cfg.ppo
        num_tokens = max(1, int(batch.mask[torch.from_numpy(minibatch)].sum()))
        kl_sum = 0.0
        for rows in self._micro_batches(batch, minibatch):
            logprobs, entropy, values = self._forward(batch, rows)
            fixed = targets.rows(rows, logprobs.shape[1], self.device)
            p_loss, p_stats = policy_loss(
                logprobs,
                fixed.old_logprobs,
                fixed.advantages,
                fixed.mask,
                clip_eps=cfg.clip_eps,
                num_tokens=num_tokens,
                weights=fixed.importance,
            )
            v_loss, v_stats = value_loss(
                values, fixed.old_values, fixed.returns, fixed.mask, value_clip=cfg.value_clip, num_tokens=num_tokens
            )
            bonus = entropy_bonus(entropy, fixed.mask, num_tokens=num_tokens)
            loss = cfg.value_coef * v_loss
            if not self._critic_only:
                loss = loss + p_loss - cfg.entropy_coef * bonus
            loss.backward()

            kl_sum += p_stats["approx_kl"].item()
            tokens = int(fixed.mask.sum())
            for key, mean in (("ppo/policy_loss", p_loss), ("value/loss", v_loss), ("ppo/entropy", bonus)):
                metrics.mean(key, mean.item() * num_tokens, tokens)
            for key, total in (
                ("ppo/clip_frac", p_stats["clipped"]),
                ("ppo/approx_kl", p_stats["approx_kl"]),
                ("ppo/ratio", p_stats["ratio"]),
                ("value/clip_frac", v_stats["clipped"]),
            ):
                metrics.mean(key, total.item(), tokens)
        return kl_sum / num_tokens

    def _optimizer_step(self, metrics: Metrics) -> None:
        if self._critic_only:
            for parameter in self.network.policy.parameters():
                parameter.grad = None
        # A NaN stops the run here, while weights and checkpoint are still sound.
        grad_norm = nn.utils.clip_grad_norm_(
            self.network.parameters(), self.cfg.optimizer.max_grad_norm, error_if_nonfinite=True
        )
        metrics.maximum("ppo/grad_norm", grad_norm.item())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def _critic_only(self) -> bool:
        return self.step < self.cfg.learner.critic_warmup_steps

    def _forward(self, batch: ExperienceBatch, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sequences = batch.sequences.rows(rows).to(self.device)
        bf16 = self.cfg.learner.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            return self.network(sequences, temperature=self.cfg.sampling.temperature)

    def _minibatches(self, count: int) -> Iterator[np.ndarray]:
        """Every epoch all rows, in an order of its own that only the seed and the step decide."""
        for epoch in range(self.cfg.ppo.ppo_epochs):
            order = np.random.default_rng([self.cfg.seed, self.step, epoch]).permutation(count)
            yield from np.split(order, self.cfg.ppo.minibatches)

    def _micro_batches(self, batch: ExperienceBatch, rows: np.ndarray) -> Iterator[Tensor]:
        lengths = batch.sequences.lengths[torch.from_numpy(rows)].tolist()
        for group in token_batches(lengths, self.cfg.learner.micro_batch_tokens):
            yield torch.from_numpy(rows[group])


def load_network(cfg: Config, device: torch.device) -> PolicyWithCritic:
    """Policy, and a separate critic if the config asks for one, in float32."""
    directory = resolve_model(cfg.model.path)
    policy = load_policy(directory, dtype=torch.float32, device=device)
    critic = None
    if cfg.learner.critic == "separate":
        critic = load_policy(directory, dtype=torch.float32, device=device).base_model
    if cfg.learner.gradient_checkpointing:
        for model in filter(None, (policy, critic)):
            checkpoint_activations(model)
    return PolicyWithCritic(policy, critic)
