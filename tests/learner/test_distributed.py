"""Several ranks: who takes what, two processes against one, and what the others do when a rank is gone."""

from __future__ import annotations

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

from common.preferences import Pair
from learner.distributed import Ranks
from learner.reward_training import RewardTrainer
from tests.fakes import save_tiny_model
from tests.learner.test_reward_training import make_pair, parameters, ragged_pairs, reward_config

LIMIT_S = 120  # of a test's processes, far above what they take: one that is still there hangs


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 64])
def test_every_index_is_one_ranks_and_loads_differ_by_no_more_than_the_dearest(world, count):
    for seed in range(5):
        costs = np.random.default_rng(seed).integers(1, 200, count).tolist()
        shares = [Ranks(rank, world).share(costs) for rank in range(world)]
        assert sorted(index for share in shares for index in share) == list(range(count))
        assert all(share == sorted(share) for share in shares)
        loads = [sum(costs[index] for index in share) for share in shares]
        assert max(loads) - min(loads) <= max(costs, default=0)
        assert shares == [Ranks(rank, world).share(costs) for rank in range(world)]


def test_a_share_worked_by_hand():
    # Dearest first to the least loaded: 5 to rank 0; 3 and 3 to rank 1, which has 3 when it gets the second; 2 to rank
    # 0, since 5 < 6; 2 to rank 1, since 6 < 7. Of two that cost the same the first goes first.
    assert [Ranks(rank, 2).share([2, 3, 5, 3, 2]) for rank in range(2)] == [[0, 2], [1, 3, 4]]


# Processes


def batches() -> list[list[Pair]]:
    """Of many pairs, of fewer, of one, which leaves a rank with none, and of as many as there are ranks."""
    return [ragged_pairs(9), ragged_pairs(5, 1), [make_pair([3, 4], [5], [36, 37], 0.5)], ragged_pairs(2, 2)]


def new_trainer(model: Path) -> RewardTrainer:
    learner = {"precision": "fp32", "micro_batch_tokens": 40, "timeout_s": LIMIT_S / 2}
    optimizer = {"schedule": "linear", "warmup_steps": 1, "max_grad_norm": 0.3}
    return RewardTrainer(reward_config(model, learner=learner, optimizer=optimizer), len(batches()) + 1)


def train_on_two_ranks(rank: int, ready: Barrier, directory: Path, model: Path) -> None:
    """One rank's process: an update for each batch; then rank 1 dies, and rank 0 tries to go on."""
    trainer = new_trainer(model)
    ready.wait()
    assert trainer.join(rank, 2, f"file://{directory}/rendezvous") == 0
    stats = [trainer.update(batch) for batch in batches()]
    result: dict[str, Any] = {"stats": stats, "weights": parameters(trainer.model)}
    if rank == 1:
        torch.save(result, directory / "rank-1.pt")
        os._exit(0)
    with pytest.raises(RuntimeError):
        trainer.update(batches()[0])
    torch.save({**result, "step": trainer.step, "weights_after": parameters(trainer.model)}, directory / "rank-0.pt")


def wait_for_a_rank_that_hangs(rank: int, ready: Barrier, directory: Path) -> None:
    """Rank 1 joins and then does nothing; rank 0 ends well if it is told."""
    ready.wait()
    ranks = Ranks.join(rank, 2, f"file://{directory}/rendezvous", device=torch.device("cpu"), timeout_s=3)
    if rank == 1:
        time.sleep(2 * LIMIT_S)
    with pytest.raises(RuntimeError):
        ranks.sum_gradients([nn.Parameter(torch.zeros(3))])
    os._exit(0)  # without waiting for what the other still owes


def run_ranks(target: Any, *arguments: Any, wait_for: tuple[int, ...]) -> None:
    """A process for each of two ranks; those in `wait_for` must end well, and none is left behind."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(2, timeout=LIMIT_S)  # imports take their time, which the ranks' own limit is not for
    processes = [context.Process(target=target, args=(rank, ready, *arguments)) for rank in range(2)]
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
    """What both ranks had in the end."""
    directory = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        run_ranks(train_on_two_ranks, directory, model, wait_for=(0, 1))
    return [torch.load(directory / f"rank-{rank}.pt") for rank in range(2)]


def test_the_batches_leave_a_rank_without_a_pair_once():
    shares = [[len(Ranks(rank, 2).share([p.num_tokens for p in batch])) for rank in range(2)] for batch in batches()]
    assert [min(share) for share in shares].count(0) == 1


def test_two_ranks_give_the_weights_and_metrics_of_one(model, two_ranks):
    alone = new_trainer(model)
    before = parameters(alone.model)
    expected = [alone.update(batch) for batch in batches()]
    torch.testing.assert_close(two_ranks[0]["weights"], parameters(alone.model), rtol=1e-5, atol=1e-7)
    assert (parameters(alone.model) - before).abs().max() > 1e-3
    for result in two_ranks:
        for found, stats in zip(result["stats"], expected, strict=True):
            assert found.pop("time/learn_s") > 0
            assert found == pytest.approx({k: v for k, v in stats.items() if k != "time/learn_s"}, rel=1e-5)


def test_all_ranks_hold_the_same_bits(two_ranks):
    assert torch.equal(two_ranks[0]["weights"], two_ranks[1]["weights"])


def test_a_rank_whose_partner_died_raises_with_its_weights_as_they_were(two_ranks):
    assert two_ranks[0]["step"] == len(batches())
    assert torch.equal(two_ranks[0]["weights_after"], two_ranks[0]["weights"])


def test_a_rank_whose_partner_hangs_raises(tmp_path):
    run_ranks(wait_for_a_rank_that_hangs, tmp_path, wait_for=(0,))


def test_a_rank_alone_sums_and_merges_nothing():
    weight = nn.Parameter(torch.zeros(3))
    Ranks().sum_gradients([weight])
    assert weight.grad is None
