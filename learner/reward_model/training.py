"""The reward model from pairwise preferences: one optimizer step on one rank, and the loop over the pairs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.config.reward_model import RewardTrainingConfig
from common.errors import UserError
from common.files import append_record, read_records
from common.metrics import Metrics
from common.model.batches import token_batches
from common.model.files import find_device, resolve_model
from common.model.kernels import install
from common.model.packing import embed
from common.model.recomputed_layers import checkpoint_activations
from common.model.reward_head import ScoreScale, head_scores, load_reward_model, save_reward_model
from learner.loop.stopping import completed, save_now
from learner.ranks.checkpoint import Checkpoints, load_checkpoint, save_checkpoint
from learner.ranks.distributed import Ranks, clip_gradients, shard, whole
from learner.ranks.optimizer import learning_rate_scale, make_optimizer, set_learning_rate
from learner.reward_model.calibration import PreferenceEvaluation, evaluate_preferences
from learner.reward_model.loss import preference_loss
from learner.reward_model.pairs import Pair, Pairs

PAIRS_PER_EVALUATION_CALL = 64


@dataclass(frozen=True)
class PairBatch:
    """B pairs, one row each: the shared tokens, then both endings, which do not see each other.

    So what the two sequences share is computed once: 37 % fewer tokens on HH-RLHF.
    """

    input_ids: Tensor  # int64 [B, T]
    positions: Tensor  # int64 [B, T], of each token in its own sequence
    visible: Tensor  # bool [B, 1, T, T]: row t may look at column u
    chosen_last: Tensor  # int64 [B], where the score is read
    rejected_last: Tensor  # int64 [B]

    @classmethod
    def pad(cls, pairs: Sequence[Pair]) -> PairBatch:
        width = max(pair.num_tokens for pair in pairs)
        input_ids = torch.zeros(len(pairs), width, dtype=torch.int64)
        positions = torch.zeros_like(input_ids)
        visible = torch.ones(width, width, dtype=torch.bool).tril().repeat(len(pairs), 1, 1)
        for row, pair in enumerate(pairs):
            shared, end = len(pair.shared_ids), pair.num_tokens
            rejected = shared + len(pair.chosen_ids)  # where the second ending begins
            input_ids[row, :end] = torch.from_numpy(
                np.concatenate([pair.shared_ids, pair.chosen_ids, pair.rejected_ids])
            )
            positions[row, :rejected] = torch.arange(rejected)
            positions[row, rejected:end] = torch.arange(shared, shared + len(pair.rejected_ids))
            visible[row, rejected:, shared:rejected] = False
        lasts = [len(p.shared_ids) + len(p.chosen_ids) - 1 for p in pairs], [p.num_tokens - 1 for p in pairs]
        return cls(input_ids, positions, visible[:, None], *(torch.tensor(last) for last in lasts))

    def last_states(self, model: PreTrainedModel) -> Tensor:
        """Where the scores are read, of chosen and of rejected sequences: [2, B, H]."""
        device = model.device
        # Additive, as every attention implementation takes it.
        blocked = torch.where(self.visible.to(device), 0.0, torch.finfo(torch.float32).min)
        hidden = model.base_model(
            inputs_embeds=embed(model.base_model, self.input_ids.to(device)),
            position_ids=self.positions.to(device),
            attention_mask=blocked,
            use_cache=False,
        ).last_hidden_state
        rows = torch.arange(len(self.input_ids), device=device)
        return torch.stack([hidden[rows, self.chosen_last.to(device)], hidden[rows, self.rejected_last.to(device)]])


class PairScorer(nn.Module):
    """The reward model over both sides of pairs."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Scores of chosen and of rejected sequences, float32 [B]."""
        chosen, rejected = head_scores(self.model, batch.last_states(self.model))
        return chosen, rejected


class RewardTrainer:
    """Holds the reward model and its optimizer. Its state after step s is a function of config, weights and pairs."""

    def __init__(self, cfg: RewardTrainingConfig, num_steps: int, *, model: PreTrainedModel | None = None) -> None:
        torch.set_num_threads(cfg.learner.threads)
        self.cfg = cfg
        self.num_steps = num_steps
        self.step = 0  # updates done
        self._ranks = Ranks()
        self._device = find_device(cfg.learner.gpus)
        if model is None:
            directory = resolve_model(cfg.model.path, trust_remote_code=cfg.model.trust_remote_code)
            model = load_reward_model(directory, dtype=torch.float32, device=self._device, install=install)
        else:
            install(model)
        self.model = model
        if cfg.learner.gradient_checkpointing:
            checkpoint_activations(self.model)
        self._network = PairScorer(self.model)
        self.optimizer = make_optimizer(self._parts(), cfg.optimizer)

    def join(self, rank: int, world: int, rendezvous: str) -> int:
        """Makes this one of the ranks of a group; returns the updates behind it. Raises UserError for a model that
        cannot read two responses in one row."""
        _check_masking(self.model, self.cfg.data.max_tokens)
        cfg = self.cfg.learner
        self._ranks = Ranks.join(rank, world, rendezvous, device=self._device, timeout_s=cfg.timeout_s)
        if world > 1:
            shard(self._network, [self.model.score], precision=cfg.precision, device=self._device)
            self.optimizer = make_optimizer(self._parts(), self.cfg.optimizer)
        return self.step

    def update(self, pairs: Sequence[Pair]) -> dict[str, float]:
        """One optimizer step on `pairs`, of which each rank takes its share; returns its metrics."""
        started, metrics, cfg = time.perf_counter(), Metrics(), self.cfg
        scale = learning_rate_scale(self.step, self.num_steps, cfg.optimizer)
        set_learning_rate(self.optimizer, scale)
        for rows in self._micro_batches(pairs):
            micro_batch = [pairs[i] for i in rows]
            chosen, rejected = self._scores(micro_batch)
            margins = cfg.loss.margin_coef * torch.tensor([p.margin for p in micro_batch], device=chosen.device)
            loss, stats = preference_loss(
                chosen, rejected, margins, centre_coef=cfg.loss.centre_coef, num_pairs=len(pairs)
            )
            (loss * self._ranks.world).backward()  # gradients are averaged over ranks, and this wants their sum
            count = len(micro_batch)
            metrics.mean("preference/loss", loss.item() * len(pairs), count)
            metrics.mean("preference/accuracy", stats["correct"].item(), count)
            metrics.mean("preference/margin", stats["margin"].item(), count)
            metrics.mean("preference/score", (chosen + rejected).sum().item() / 2, count)
        self._ranks.merge(metrics)
        norm = clip_gradients(self._network.parameters(), cfg.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        metrics.last("preference/grad_norm", norm)
        metrics.last("preference/learning_rate", cfg.optimizer.learning_rate * scale)
        metrics.last("learner/tokens", sum(pair.num_tokens for pair in pairs))
        metrics.last("time/learn_s", time.perf_counter() - started)
        return metrics.result()

    @torch.no_grad()
    def scores(self, pairs: Sequence[Pair]) -> np.ndarray:
        """Scores of both sides of each pair, float32 [N, 2], of which each rank computes its share."""
        result = torch.zeros(len(pairs), 2)
        for rows in self._micro_batches(pairs):
            result[rows] = torch.stack(self._scores([pairs[i] for i in rows]), dim=1).cpu()
        return self._ranks.sum(result).numpy()

    def save(self, directory: Path) -> None:
        """Every rank writes its share."""
        save_checkpoint(directory, self._network, self.optimizer, {"step": self.step})

    def restore(self, directory: Path) -> int:
        """Restores a saved state, whatever the number of ranks that wrote it; returns the updates it has behind it."""
        self.step = load_checkpoint(directory, self._network, self.optimizer)["step"]
        return self.step

    def save_model(self, directory: Path) -> None:
        """The reward model as a Hugging Face directory."""
        tensors = {name: whole(value).to("cpu", torch.bfloat16) for name, value in self.model.state_dict().items()}
        if self._ranks.rank == 0:
            scale = ScoreScale(chat=self.cfg.data.format == "chat")
            save_reward_model(self.model, resolve_model(self.cfg.model.path), directory, scale, tensors=tensors)

    def _parts(self) -> list[tuple[nn.Module, float]]:
        cfg = self.cfg.optimizer
        return [(self.model.base_model, cfg.learning_rate), (self.model.score, cfg.head_learning_rate)]

    def _scores(self, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Of no pairs, the pass over something short that keeps this rank in step, and nothing of it."""
        bf16 = self.cfg.learner.precision == "bf16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=bf16):
            chosen, rejected = self._network(PairBatch.pad(pairs or [_SHORT]))
        return chosen[: len(pairs)], rejected[: len(pairs)]

    def _micro_batches(self, pairs: Sequence[Pair]) -> list[list[int]]:
        """This rank's share of the pairs, those of like lengths together, each group within the token budget."""
        lengths = [pair.num_tokens for pair in pairs]
        return self._ranks.micro_batches(
            lengths, lambda share: token_batches([lengths[i] for i in share], self.cfg.learner.token_budget)
        )


_ONE_TOKEN = np.zeros(1, dtype=np.int32)
_SHORT = Pair(_ONE_TOKEN, _ONE_TOKEN, _ONE_TOKEN)


@torch.no_grad()
def _check_masking(model: PreTrainedModel, max_tokens: int) -> None:
    """Two endings in one row need a model that heeds its mask and positions: raises UserError for others, such as those
    with a sliding window shorter than a row, or with recurrent layers."""
    ids = np.arange(2 * max_tokens, dtype=np.int32) % 7 + 2
    shared = ids[: max_tokens // 2]
    ends = ids[len(shared) : max_tokens], ids[-(max_tokens - len(shared)) :]
    try:
        together = PairBatch.pad([Pair(shared, *ends)]).last_states(model)[:, 0]
    except Exception as error:  # what a model that takes no such mask raises is its own choice
        raise UserError(f"{_UNSUITED}; it fails with {type(error).__name__}: {error}") from error
    rows = (torch.from_numpy(np.concatenate([shared, end])).long()[None].to(model.device) for end in ends)
    apart = torch.cat([model.base_model(input_ids=row, use_cache=False).last_hidden_state[:, -1] for row in rows])
    window = getattr(model.config, "sliding_window", None) or max_tokens
    if window < max_tokens or not torch.allclose(together, apart, rtol=1e-2, atol=1e-2):
        raise UserError(_UNSUITED)


_UNSUITED = (
    "this model cannot read two responses in one row (a sliding window shorter than data.max_tokens, or layers that do "
    "not heed the attention mask), which reward training needs; use a model with plain attention"
)


class Trainers(Protocol):
    """What the loop asks of the group of ranks."""

    @property
    def step(self) -> int: ...

    async def update(self, pairs: Sequence[Pair]) -> dict[str, float]: ...

    async def scores(self, pairs: Sequence[Pair]) -> np.ndarray: ...

    async def save(self, directory: Path) -> None: ...

    async def restore(self, directory: Path) -> None: ...

    async def save_model(self, directory: Path) -> None: ...


@dataclass
class RewardRun:
    """Everything a run of reward training is made of, joined."""

    cfg: RewardTrainingConfig
    directory: Path
    pairs: Pairs
    heldout: Pairs
    trainer: Trainers
    on_step: Callable[[dict[str, Any]], None] = lambda record: None
    on_evaluation: Callable[[PreferenceEvaluation], None] = lambda evaluation: None
    checkpoints: Checkpoints = field(init=False)
    _order: tuple[int, np.ndarray] = field(init=False, default=(-1, np.empty(0)))  # (epoch, permutation)

    def __post_init__(self) -> None:
        checkpoint = self.cfg.checkpoint
        self.checkpoints = Checkpoints(self.directory / "checkpoints", every=checkpoint.every, keep=checkpoint.keep)

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.pairs), self.cfg)

    def batch(self, step: int) -> list[Pair]:
        """The pairs of one step: every epoch all of them, in an order that only seed and epoch decide."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.cfg.seed, 1, epoch]).permutation(len(self.pairs))
        size = self.cfg.pairs_per_step
        return [self.pairs[int(i)] for i in self._order[1][place * size : (place + 1) * size]]


def steps_per_epoch(num_pairs: int, cfg: RewardTrainingConfig) -> int:
    return -(-num_pairs // cfg.pairs_per_step)


async def train_reward_model(run: RewardRun) -> list[PreferenceEvaluation]:
    """From wherever the run directory stands to the last epoch; returns the evaluations, oldest first.

    Evaluates after every epoch. Leaves the model in RUN/model.
    """
    trainer, num_steps = run.trainer, run.cfg.epochs * run.steps_per_epoch
    if (checkpoint := run.checkpoints.newest()) is not None:
        await trainer.restore(checkpoint)
    evaluations = [PreferenceEvaluation.from_record(r) for r in read_records(run.directory / "evaluations.jsonl")]
    logged = {record["step"] for record in read_records(run.directory / "metrics.jsonl")}
    await _evaluate_if_due(run, evaluations)  # a crash may have come between a checkpoint and its evaluation
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
    return evaluations


async def _train_step(run: RewardRun, num_steps: int, logged: Container[int]) -> None:
    """One optimizer step, its record, and a checkpoint if one is due."""
    trainer, step = run.trainer, run.trainer.step
    stats = await trainer.update(run.batch(step))
    record = {"step": step, "epoch": (step + 1) / run.steps_per_epoch, **stats}
    if step not in logged:  # a resumed run repeats the steps since its checkpoint, to the same result
        append_record(run.directory / "metrics.jsonl", {"time": time.time(), **record})
    run.on_step(record)
    if run.checkpoints.due(trainer.step, num_steps):
        await trainer.save(run.checkpoints.path(trainer.step))
        run.checkpoints.prune()


async def _evaluate_if_due(run: RewardRun, evaluations: list[PreferenceEvaluation]) -> None:
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
