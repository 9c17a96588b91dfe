"""Several ranks: two processes against one, and a rank that dies or hangs."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from common.errors import BatchError
from common.metrics.step import StepMetrics
from learner.ranks.distributed import Ranks, clip_gradients, whole
from learner.ranks.rows import shares
from learner.reward_model.pairs import Pair
from learner.reward_model.trainer import RewardTrainer
from tests.fakes import save_tiny_model
from tests.learner.reward_model.test_training import make_pair, ragged_pairs, reward_config

LIMIT_S = 240  # for the processes of a test: they take far less, so one that is still alive hangs


# A single rank


def test_a_single_rank_sums_and_merges_nothing():
    tensor, metrics = torch.tensor([1.0, 2.0]), StepMetrics()
    metrics.add("ppo/ratio", 3.0, 2)
    assert torch.equal(Ranks().sum(tensor), torch.tensor([1.0, 2.0]))
    Ranks().merge(metrics)
    assert metrics.result() == {"ppo/ratio": 1.5}
    weight = nn.Parameter(torch.ones(3))
    assert torch.equal(whole(weight), torch.ones(3))
    assert not whole(weight).requires_grad


@pytest.mark.parametrize(("limit", "scale"), [(2.6, 0.2), (13.0, 1.0), (100.0, 1.0)])
def test_gradients_are_scaled_to_their_joint_norm(limit, scale):
    # |(3, 4, 12)| = 13 over both parameters; the one without a gradient counts for nothing.
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(5))]
    weights[0].grad, weights[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
    assert clip_gradients(weights, limit) == pytest.approx(13.0, rel=1e-6)
    torch.testing.assert_close(weights[0].grad, scale * torch.tensor([3.0, 4.0]), rtol=1e-5, atol=0)
    torch.testing.assert_close(weights[1].grad, scale * torch.tensor([12.0]), rtol=1e-5, atol=0)
    assert weights[2].grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_an_error(bad):
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([1.0, bad])
    with pytest.raises(BatchError, match="not finite"):
        clip_gradients([weight], 1.0)


# Processes


def batches() -> list[list[Pair]]:
    """Batches of many pairs, of fewer, of one, which leaves a rank without a pair, and of one per rank."""
    return [ragged_pairs(9), ragged_pairs(5, 1), [make_pair([3, 4], [5], [36, 37], 0.5)], ragged_pairs(2, 2)]


def new_trainer(model: Path) -> RewardTrainer:
    learner = {"precision": "fp32", "micro_batch_tokens": 40, "timeout_s": LIMIT_S / 2}
    optimizer = {"schedule": "linear", "warmup_steps": 1, "max_grad_norm": 0.3}
    return RewardTrainer(reward_config(model, learner=learner, optimizer=optimizer), len(batches()) + 1)


def weights(trainer: RewardTrainer) -> torch.Tensor:
    return torch.cat([whole(p).flatten() for p in trainer.model.parameters()])


def local_weights(trainer: RewardTrainer) -> torch.Tensor:
    """This rank's share, as the optimizer holds it: a pass that broke off may have left the network's gathered."""
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    return torch.cat([p.detach().to_local().flatten() for p in parameters])


def facts_of_two_ranks(ranks: Ranks, trainer: RewardTrainer) -> dict[str, Any]:
    """One rank's results of exchanges with known results, and of sharded weights."""
    metrics = StepMetrics()
    metrics.add("ppo/ratio", ranks.rank + 1, 2 + ranks.rank)  # (1 + 2) / (2 + 3)
    if ranks.rank == 1:
        metrics.add("ppo/entropy", 3.0, 4)
    metrics.add("kl/coef", 7.0)
    ranks.merge(metrics)
    total = ranks.sum(torch.tensor([1.0, 10.0]) * (ranks.rank + 1))
    parameters = list(trainer.model.parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    norm = clip_gradients(parameters, 0.5)
    largest = max(whole(p.grad).abs().max().item() for p in parameters)
    trainer.optimizer.zero_grad(set_to_none=True)
    return {
        "merged": metrics.result(),
        "sum": total,
        "norm": norm,
        "largest": largest,
        "held": sum(p.to_local().numel() for p in parameters),
        "moments": sum(state["exp_avg"].to_local().numel() for state in trainer.optimizer.state.values()),
        "dtypes": {whole(p).dtype for p in parameters},
        "all": sum(p.numel() for p in parameters),
    }


def train_on_two_ranks(rank: int, ready: Barrier, directory: Path, model: Path) -> None:
    """One rank's process: an update for each batch; then rank 1 dies, and rank 0 tries to continue."""
    trainer = new_trainer(model)
    ready.wait()
    assert trainer.join(rank, 2, f"file://{directory}/rendezvous") == 0
    stats = [trainer.update(batch) for batch in batches()]
    result: dict[str, Any] = {"stats": stats, "weights": weights(trainer), "local": local_weights(trainer)}
    result |= facts_of_two_ranks(Ranks(rank, 2), trainer)
    result["scores"] = trainer.scores(ragged_pairs(5, 3))
    if rank == 1:
        torch.save(result, directory / "rank-1.pt")
        os._exit(0)
    with pytest.raises(RuntimeError):
        trainer.update(batches()[0])
    torch.save({**result, "step": trainer.step, "local_after": local_weights(trainer)}, directory / "rank-0.pt")
    os._exit(0)  # without waiting for the other's part


def wait_for_a_rank_that_hangs(rank: int, ready: Barrier, directory: Path) -> None:
    """Rank 1 joins and then does nothing; rank 0 ends well if it is told."""
    ready.wait()
    ranks = Ranks.join(rank, 2, f"file://{directory}/rendezvous", device=torch.device("cpu"), timeout_s=3)
    if rank == 1:
        time.sleep(2 * LIMIT_S)
    with pytest.raises(RuntimeError):
        ranks.sum(torch.zeros(3))
    os._exit(0)  # without waiting for the other's part


def run_ranks(target: Any, *arguments: Any, wait_for: tuple[int, ...] = (0, 1)) -> None:
    """`target(rank, ready, *arguments)` in a process for each of two ranks; those in `wait_for` must end well, and none
    is left behind."""
    context = multiprocessing.get_context("forkserver")  # which imports once for all tests
    context.set_forkserver_preload(["learner.ppo.learner", "learner.reward_model.trainer"])
    ready = context.Barrier(2, timeout=LIMIT_S)  # imports take their time, which the ranks' own limit is not for
    processes = [context.Process(target=target, args=(rank, ready, *arguments)) for rank in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        for process in processes:
            process.start()
    try:
        for rank in wait_for:
            processes[rank].join(LIMIT_S)
            assert processes[rank].exitcode == 0, f"rank {rank}: {processes[rank].exitcode}"
    finally:
        for process in processes:
            process.kill()
            process.join()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A reward model whose head is not zero, so that a first step moves all its weights."""
    directory = save_tiny_model(tmp_path_factory.mktemp("model"))
    reward_model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=1, pad_token_id=0)
    nn.init.normal_(reward_model.score.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    reward_model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def two_ranks(model, tmp_path_factory):
    """The results of both ranks."""
    directory = tmp_path_factory.mktemp("ranks")
    run_ranks(train_on_two_ranks, directory, model)
    return [torch.load(directory / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


def test_the_batches_leave_a_rank_without_a_pair_once():
    sizes = [[len(share) for share in shares([p.num_tokens for p in batch], 2)] for batch in batches()]
    assert [min(size) for size in sizes].count(0) == 1


def test_two_ranks_give_the_weights_and_metrics_of_one(model, two_ranks):
    """Metrics to 1e-5, and 1e-6 absolute: a margin is a difference of scores near one."""
    alone = new_trainer(model)
    before = weights(alone)
    expected = [alone.update(batch) for batch in batches()]
    torch.testing.assert_close(two_ranks[0]["weights"], weights(alone), rtol=1e-5, atol=1e-7)
    assert (weights(alone) - before).abs().max() > 1e-3
    for result in two_ranks:
        for found, stats in zip(result["stats"], expected, strict=True):
            assert found.pop("time/learn_s") > 0
            assert found == pytest.approx({k: v for k, v in stats.items() if k != "time/learn_s"}, rel=1e-5, abs=1e-6)


def test_both_ranks_give_the_scores_of_one(model, two_ranks):
    alone = new_trainer(model)
    for batch in batches():
        alone.update(batch)
    for result in two_ranks:
        np.testing.assert_allclose(result["scores"], alone.scores(ragged_pairs(5, 3)), atol=1e-5)


def test_ranks_shard_weights_and_optimizer_state_in_float32(two_ranks):
    assert torch.equal(two_ranks[0]["weights"], two_ranks[1]["weights"])
    every = two_ranks[0]["all"]
    for held in ("held", "moments"):
        assert sum(result[held] for result in two_ranks) == every
        assert max(result[held] for result in two_ranks) < 0.51 * every
    assert two_ranks[0]["dtypes"] == {torch.float32}


def test_sums_means_and_the_gradient_norm_are_those_of_both_ranks(two_ranks):
    for result in two_ranks:
        assert torch.equal(result["sum"], torch.tensor([3.0, 30.0]))
        assert result["merged"] == {"ppo/ratio": 3 / 5, "ppo/entropy": 3 / 4, "kl/coef": 7.0}
        assert result["norm"] == pytest.approx(math.sqrt(result["all"]), rel=1e-6)  # of ones
        assert result["largest"] == pytest.approx(0.5 / math.sqrt(result["all"]), rel=1e-5)


def test_a_rank_whose_partner_died_raises_with_unchanged_weights(two_ranks):
    assert two_ranks[0]["step"] == len(batches())
    assert torch.equal(two_ranks[0]["local_after"], two_ranks[0]["local"])


def test_a_rank_whose_partner_hangs_raises(tmp_path):
    run_ranks(wait_for_a_rank_that_hangs, tmp_path, wait_for=(0,))
