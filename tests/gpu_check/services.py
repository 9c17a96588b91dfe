"""The reference policy, a reward model and its training on the device, against the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from actors.scoring.model_source import RewardModelSource
from actors.scoring.reference import ReferencePolicy
from common.config.actors import ReferenceConfig
from common.config.reward_model import RewardTrainingConfig
from common.config.sources import ModelSourceConfig
from common.types import Rollout
from learner.reward_model.pairs import Pair
from learner.reward_model.trainer import RewardTrainer
from tests.fakes import make_prompt, make_rollout, save_tiny_model
from tests.gpu_check.run import Run

NEAR = {"float32": 1e-3, "bfloat16": 0.1}  # nats, or units of a score


def check(run: Run) -> None:
    language_model = save_tiny_model(run.scratch / "language-model")
    reward_model = save_reward_model(run.scratch / "reward-model")
    for dtype in NEAR:
        run.part(f"services, reference in {dtype}", check_reference, language_model, dtype)
        run.part(f"services, reward model in {dtype}", check_source, reward_model, dtype)
    for precision in ("fp32", "bf16"):
        run.part(f"services, reward training in {precision}", check_training, reward_model, precision)


def save_reward_model(directory: Path) -> Path:
    """A tiny classifier whose head is not zero."""
    save_tiny_model(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1, pad_token_id=0)
    nn.init.normal_(model.score.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(directory)
    return directory


def check_reference(run: Run, model: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    rollouts: list[Rollout] = [
        make_rollout(make_prompt(i, tuple(rng.integers(3, 64, 5 + i))), rng.integers(3, 64, 9 + 2 * i).tolist())
        for i in range(6)
    ]

    def logprobs(gpus: int, dtype: str) -> list[np.ndarray]:
        cfg = ReferenceConfig(gpus=gpus, dtype=dtype)
        return ReferencePolicy("reference", cfg, model=str(model), temperature=0.8).forward(rollouts)

    pairs = zip(logprobs(run.gpus, dtype), logprobs(0, "float32"), strict=True)
    off = max(float(np.abs(mine - exact).max()) for mine, exact in pairs)
    run.expect(off < NEAR[dtype], f"services: log-probabilities of the reference in {dtype} are off by {off:.1e} nats")


def check_source(run: Run, model: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(3, 64, length).tolist() for length in (3, 40, 17, 16, 1)]

    def scores(gpus: int, dtype: str) -> np.ndarray:
        cfg = ModelSourceConfig(name="helpful", model=str(model), dtype=dtype)
        return np.array(RewardModelSource(cfg, gpus=gpus).forward(sequences))

    off = float(np.abs(scores(run.gpus, dtype) - scores(0, "float32")).max())
    run.expect(off < NEAR[dtype], f"services: scores of a reward model in {dtype} are off by {off:.1e}")


def check_training(run: Run, model: Path, precision: str) -> None:
    rng = np.random.default_rng(0)
    pairs = [
        Pair(*(rng.integers(3, 64, int(n)).astype(np.int32) for n in rng.integers((0, 1, 1), (12, 14, 14))))
        for _ in range(12)
    ]

    def train(gpus: int, precision: str) -> tuple[dict[str, float], np.ndarray]:
        cfg = RewardTrainingConfig.model_validate(
            {
                "pairs_per_step": 12,
                "model": {"path": str(model)},
                "data": {"train": "pairs.jsonl", "max_tokens": 32},
                "optimizer": {"learning_rate": 1e-3, "eps": 1e-3},
                "learner": {"gpus": gpus, "precision": precision, "micro_batch_tokens": 128},
            }
        )
        trainer = RewardTrainer(cfg, num_steps=4)
        trainer.join(0, 1, "")
        trainer.update(pairs)
        return trainer.update(pairs), trainer.scores(pairs)

    (mine, scores), (cpu, exact) = train(run.gpus, precision), train(0, "fp32")
    off = abs(mine["preference/loss"] - cpu["preference/loss"]), float(np.abs(scores - exact).max())
    near = 1e-4 if precision == "fp32" else 0.05
    run.expect(
        max(off) < near, f"services: loss and scores after two steps of reward training in {precision}: off by {off}"
    )
