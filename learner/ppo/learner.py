"""One PPO step on one rank: a batch of experience in, new weights and what happened out."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from common.config.ppo import Config
from common.metrics import Metrics
from common.model.batches import packed_batches
from common.model.files import find_device, resolve_model, save_policy
from common.model.masking import masked_mean, masked_sum, masked_var, whiten
from common.model.packing import Sequences
from common.model.size import model_size
from common.types import Rollout
from common.weights import Bucket, Changes, Note, buckets, publication
from learner.ppo import lora
from learner.ppo.advantages import gae
from learner.ppo.experience import ExperienceBatch, estimated_costs
from learner.ppo.losses import entropy_bonus, importance_weights, policy_loss, value_loss
from learner.ppo.policy import PolicyWithCritic
from learner.ppo.shaping import (
    KL_ESTIMATORS,
    AdaptiveKL,
    FixedKL,
    KLController,
    RunningMoments,
    normalise,
    token_rewards,
)
from learner.ranks.checkpoint import load_checkpoint, load_network, save_checkpoint
from learner.ranks.distributed import Ranks, clip_gradients, shard
from learner.ranks.optimizer import learning_rate_scale, make_optimizer, set_learning_rate

Outputs = tuple[Tensor, Tensor, Tensor]  # logprobs, entropy, values, [b, r] of a micro-batch
MicroBatches = list[Tensor]  # the rows of each; none in those that only keep a rank in step


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
        self._ranks = Ranks()
        # Several ranks share it out before it goes to a device, where it might not fit as a whole.
        directory = resolve_model(cfg.model.path, trust_remote_code=cfg.model.trust_remote_code)
        held_on = self.device if cfg.learner.ranks == 1 else torch.device("cpu")
        self.network = network or PolicyWithCritic.load(directory, cfg.learner, held_on, seed=cfg.seed)
        self.optimizer = make_optimizer(self.network.parts(cfg.optimizer), cfg.optimizer)
        self._size = model_size(directory)
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

    def join(self, rank: int, world: int, rendezvous: str) -> int:
        """Makes this one of the ranks of a group, once; returns the updates behind it."""
        cfg = self.cfg.learner
        self._ranks = Ranks.join(rank, world, rendezvous, device=self.device, timeout_s=cfg.timeout_s)
        if world > 1:
            shard(self.network, [self.network.value_head], precision=cfg.precision, device=self.device)
            self.optimizer = make_optimizer(self.network.parts(self.cfg.optimizer), self.cfg.optimizer)
        return self.step

    def update(self, table: pa.Table) -> dict[str, float]:
        """One PPO step on `table`, of which each rank takes its share; returns its metrics, the same on every rank."""
        started = time.perf_counter()
        metrics = Metrics()
        batch = ExperienceBatch.from_table(table)
        plan = self._micro_batches(batch.sequences, np.arange(len(batch.scores)))
        # A first optimizer step over the whole batch starts where the batch was written: if one forward pass takes it
        # all, that pass also gives what the targets need.
        first = self._forward(batch.sequences, plan[0]) if self.cfg.ppo.minibatches == 1 and len(plan) == 1 else None
        targets = self._targets(batch, plan, first, metrics)
        forwarded = time.perf_counter()

        scale = learning_rate_scale(self.step, self.cfg.num_steps, self.cfg.optimizer)
        set_learning_rate(self.optimizer, scale)
        metrics.last("ppo/learning_rate", self.cfg.optimizer.learning_rate * scale)
        self._optimise(batch, targets, first, metrics)

        self._ranks.merge(metrics)
        metrics.last("learner/tokens", int(batch.sequences.lengths.sum()))
        metrics.last("time/old_logprobs_s", forwarded - started)
        metrics.last("time/optimise_s", time.perf_counter() - forwarded)
        self.step += 1
        return metrics.result()

    def policy_logprobs(self, *rollouts: Rollout) -> list[np.ndarray]:
        """Log-probabilities of each rollout's response, float32 [R], nats."""
        return self._logprobs(rollouts, reference=False)

    def ref_logprobs(self, *rollouts: Rollout) -> list[np.ndarray]:
        """With LoRA: of each rollout's response the log-probabilities without adapters, float32 [R], nats."""
        return self._logprobs(rollouts, reference=True)

    def _logprobs(self, rollouts: Sequence[Rollout], *, reference: bool) -> list[np.ndarray]:
        sequences = Sequences.pack([r.prompt.token_ids for r in rollouts], [r.response_ids for r in rollouts])
        result = torch.zeros(sequences.response_mask.shape)
        with torch.no_grad():
            for rows in self._micro_batches(sequences, np.arange(len(rollouts))):
                logprobs, _, _ = self._forward(sequences, rows, reference=reference)
                result[rows, : logprobs.shape[1]] = logprobs.cpu()
        self._ranks.sum(result)
        return [row[: len(r.response_ids)] for row, r in zip(result.numpy(), rollouts, strict=True)]

    def publish(self, *held: Bucket) -> Iterator[Bucket | Changes | Note | None]:
        """The policy's weights bucket by bucket, with what has changed since the buckets `held` by the generators if
        these are wanted: see `publication`. Ranks other than the first help to gather them, and give nothing."""
        tensors = self.network.policy_tensors()
        if self._ranks.rank > 0:
            deque(tensors, maxlen=0)
            return
        base = held if self.cfg.generators.updates == "changes" else ()
        yield from publication(buckets(tensors, self.policy_version), base)

    def save(self, directory: Path) -> None:
        """Every rank writes its share."""
        numbers = {"step": self.step, "kl_coef": self.kl_controller.coef, "score_moments": asdict(self.score_moments)}
        save_checkpoint(directory, self.network, self.optimizer, numbers)

    def restore(self, directory: Path) -> int:
        """Restores a saved state, whatever the number of ranks that wrote it; returns the updates it has behind it."""
        numbers = load_checkpoint(directory, self.network, self.optimizer)
        self.step = numbers["step"]
        self.kl_controller.coef = numbers["kl_coef"]
        self.score_moments = RunningMoments(**numbers["score_moments"])
        return self.step

    def restore_policy(self, directory: Path) -> int:
        """Restores policy and critic of a saved state, not the optimizer, in a learner of one rank that will not train;
        returns the updates they have behind them."""
        self.step = load_network(directory, self.network)["step"]
        return self.step

    def save_policy(self, directory: Path, *, adapter: Path | None = None) -> None:
        """The policy as a Hugging Face directory, with LoRA's adapters merged, and the adapters alone in `adapter`, or
        next to the policy."""
        if self._ranks.rank > 0:  # helps to gather them
            deque(chain(self.network.policy_tensors(), self.network.adapter_tensors()), maxlen=0)
            return
        base = resolve_model(self.cfg.model.path)
        tensors = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in self.network.policy_tensors()}
        adapters = {name: tensor.cpu() for name, tensor in self.network.adapter_tensors()}
        save_policy(tensors, base, directory)
        if self.cfg.learner.lora:
            lora.save(adapters, self.cfg.learner.lora, str(base), adapter or directory.with_name("adapter"))

    def _targets(self, batch: ExperienceBatch, plan: MicroBatches, first: Outputs | None, metrics: Metrics) -> Targets:
        """Old log-probabilities and values, rewards, GAE, whitening, over the whole batch. Every rank computes the
        forward passes of its share, and the rest in full."""
        cfg, mask = self.cfg.ppo, batch.mask
        old_logprobs, old_values = torch.zeros_like(batch.ref_logprobs), torch.zeros_like(batch.ref_logprobs)
        with torch.no_grad():
            for rows in plan:
                logprobs, _, values = first or self._forward(batch.sequences, rows)
                old_logprobs[rows, : logprobs.shape[1]] = logprobs.cpu()
                old_values[rows, : values.shape[1]] = values.cpu()
        self._ranks.sum(old_logprobs)
        self._ranks.sum(old_values)
        if self.step > 0 and bool((batch.by_reference & mask.any(1)).any()):
            raise RuntimeError(f"step {self.step} has rollouts without ref_logprobs; only those of step 0 need none")
        ref_logprobs = torch.where(batch.by_reference[:, None], old_logprobs, batch.ref_logprobs)
        kl = KL_ESTIMATORS[self.cfg.kl.estimator](old_logprobs, ref_logprobs)
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

    def _optimise(self, batch: ExperienceBatch, targets: Targets, first: Outputs | None, metrics: Metrics) -> None:
        """ppo_epochs x minibatches optimizer steps, ended early by target_kl."""
        target_kl, done = self.cfg.ppo.target_kl, 0
        for minibatch in self._minibatches(len(batch.scores)):
            approx_kl = self._backward(batch, targets, minibatch, first, metrics)
            first = None
            if target_kl and approx_kl > target_kl:
                self.optimizer.zero_grad(set_to_none=True)
                break
            self._optimizer_step(metrics)
            done += 1
        metrics.last("ppo/optimizer_steps", done)

    def _backward(
        self, batch: ExperienceBatch, targets: Targets, minibatch: np.ndarray, first: Outputs | None, metrics: Metrics
    ) -> float:
        """Gradient of the loss on one minibatch; returns its mean KL from the old policy, nats per token."""
        cfg = self.cfg.ppo
        num_tokens = max(1, int(batch.mask[torch.from_numpy(minibatch)].sum()))
        kl_sum = torch.zeros((), dtype=torch.float64)
        for rows in self._micro_batches(batch.sequences, minibatch):
            logprobs, entropy, values = first or self._forward(batch.sequences, rows)
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
                loss = loss + p_loss
                if cfg.entropy_coef:
                    loss = loss - cfg.entropy_coef * bonus
            (loss * self._ranks.world).backward()  # gradients are averaged over ranks, and this wants their sum

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
        return self._ranks.sum(kl_sum).item() / num_tokens

    def _optimizer_step(self, metrics: Metrics) -> None:
        if self._critic_only:
            for parameter in self.network.policy.parameters():
                parameter.grad = None
        metrics.maximum("ppo/grad_norm", clip_gradients(self.network.parameters(), self.cfg.optimizer.max_grad_norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def _critic_only(self) -> bool:
        return self.step < self.cfg.learner.critic_warmup_steps

    def _forward(self, sequences: Sequences, rows: Tensor, *, reference: bool = False) -> Outputs:
        """Of no rows, the pass over something short that keeps this rank in step, and nothing of it."""
        chosen = sequences.rows(rows) if len(rows) else Sequences.pack([np.zeros(1)], [np.zeros(1)])
        bf16 = self.cfg.learner.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            logprobs, entropy, values = self.network(
                chosen.to(self.device), temperature=self.cfg.sampling.temperature, reference=reference
            )
        return logprobs[: len(rows)], entropy[: len(rows)], values[: len(rows)]

    def _minibatches(self, count: int) -> Iterator[np.ndarray]:
        """Every epoch all rows, in an order of its own that only the seed and the step decide."""
        for epoch in range(self.cfg.ppo.ppo_epochs):
            order = np.random.default_rng([self.cfg.seed, self.step, epoch]).permutation(count)
            yield from np.split(order, self.cfg.ppo.minibatches)

    def _micro_batches(self, sequences: Sequences, rows: np.ndarray) -> MicroBatches:
        """This rank's share of the rows, packed under the token budget."""
        chosen = torch.from_numpy(np.sort(rows))  # a minibatch is a set: one plan for it, whatever its order
        minibatch = sequences.rows(chosen)
        lengths = minibatch.lengths.tolist()
        groups = self._ranks.micro_batches(
            estimated_costs(minibatch, self._size),
            lambda share: packed_batches([lengths[i] for i in share], self.cfg.learner.token_budget),
        )
        return [chosen[group] for group in groups]
