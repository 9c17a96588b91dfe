"""Training of a reward model on one rank. Runs in every trainer rank."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.config.reward_model import RewardTrainingConfig
from common.metrics.step import StepMetrics
from common.model.batches import token_batches
from common.model.compiled_layers import compile_layers
from common.model.files import resolve_model
from common.model.kernels import install
from common.model.recomputed_layers import checkpoint_activations
from common.model.reward_head import ScoreScale, load_reward_model, save_reward_model
from common.model.transfer import on_device
from learner.ranks.device import trainer_device
from learner.ranks.distributed import whole
from learner.ranks.trainer import Trainer, read_together
from learner.reward_model.loss import preference_loss
from learner.reward_model.pair_batch import PairBatch, PairScorer, check_masking
from learner.reward_model.pairs import Pair


class RewardTrainer(Trainer):
    """Trains a reward model on preference pairs."""

    cfg: RewardTrainingConfig

    def __init__(self, cfg: RewardTrainingConfig, num_steps: int, *, model: PreTrainedModel | None = None) -> None:
        device = trainer_device(cfg.learner)
        if model is None:
            directory = resolve_model(cfg.model.path, trust_remote_code=cfg.model.trust_remote_code)
            model = load_reward_model(directory, dtype=torch.float32, device=device, install=install)
        else:
            install(model)
        self.model = model
        if cfg.learner.gradient_checkpointing:
            checkpoint_activations(self.model)
        if cfg.learner.compiles:
            compile_layers(self.model)
        super().__init__(PairScorer(self.model), cfg, num_steps=num_steps, device=device)

    def join(self, rank: int, world: int, rendezvous: str) -> int:
        """See `Trainer.join`. Raises UserError for a model that cannot read two responses in one row."""
        check_masking(self.model, self.cfg.data.max_tokens)
        return super().join(rank, world, rendezvous)

    def update(self, pairs: Sequence[Pair]) -> dict[str, float]:
        """One optimizer step. Each rank takes its share of `pairs`. Returns the metrics, the same on every rank."""
        started, metrics, cfg = time.perf_counter(), StepMetrics(), self.cfg
        scale = self.set_learning_rate()
        parts: list[tuple[int, dict[str, Tensor]]] = []  # pairs of each micro-batch, and its sums by metric key
        for rows in self._micro_batches(pairs):
            chosen_pairs = [pairs[i] for i in rows]
            chosen, rejected = self._scores(chosen_pairs)
            margins = cfg.loss.margin_coef * on_device(torch.tensor([p.margin for p in chosen_pairs]), chosen.device)
            loss, stats = preference_loss(
                chosen, rejected, margins, centre_coef=cfg.loss.centre_coef, num_pairs=len(pairs)
            )
            self.backward(loss)
            sums = {
                "preference/loss": loss.double() * len(pairs),
                "preference/accuracy": stats["correct"].double(),
                "preference/margin": stats["margin"].double(),
                "preference/score": (chosen + rejected).sum().double() / 2,
            }
            parts.append((len(rows), {key: total.detach() for key, total in sums.items()}))
        for count, numbers in read_together(parts):
            for key, total in numbers.items():
                metrics.add(key, total, count)
        self.ranks.merge(metrics)
        metrics.add("preference/grad_norm", self.optimizer_step())
        self.step += 1
        metrics.add("preference/learning_rate", cfg.optimizer.learning_rate * scale)
        metrics.add("learner/tokens", sum(pair.num_tokens for pair in pairs))
        metrics.add("time/learn_s", time.perf_counter() - started)
        return metrics.result()

    @torch.no_grad()
    def scores(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Scores of both sides of each pair, float32 [N, 2]. Each rank computes its share; all return the whole."""
        result = torch.zeros(len(pairs), 2)
        for rows in self._micro_batches(pairs):
            result[rows] = torch.stack(self._scores([pairs[i] for i in rows]), dim=1).cpu()
        return self.ranks.sum(result).numpy()

    def save_model(self, directory: Path) -> None:
        """Writes the reward model as a Hugging Face directory."""
        gathered = ((name, whole(value, torch.bfloat16)) for name, value in self.model.state_dict().items())
        tensors = {name: value.to("cpu", torch.bfloat16) for name, value in gathered}
        if self.ranks.rank == 0:
            scale = ScoreScale(chat=self.cfg.data.format == "chat")
            save_reward_model(self.model, resolve_model(self.cfg.model.path), directory, scale, tensors=tensors)

    # This trainer's part of `Trainer`

    def parts(self) -> list[tuple[nn.Module, float]]:
        cfg = self.cfg.optimizer
        return [(self.model.base_model, cfg.learning_rate), (self.model.score, cfg.head_learning_rate)]

    def exact_modules(self) -> list[nn.Module]:
        return [self.model.score]

    def dummy_batch(self) -> PairBatch:
        token = np.zeros(1, dtype=np.int32)
        return PairBatch.pad([Pair(token, token, token)])

    def _scores(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Scores of chosen and of rejected sequences, float32 [B]."""
        chosen, rejected = self.forward(PairBatch.pad(pairs) if pairs else None, len(pairs))
        return chosen, rejected

    def _micro_batches(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """This rank's share of the pairs, those of similar length together."""
        lengths = [pair.num_tokens for pair in pairs]
        return self.micro_batches(lengths, lengths, token_batches)
