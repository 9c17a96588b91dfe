"""Sharding over NCCL (FSDP2) with as many ranks as one process can be: one. And the optimizer with empty shards."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import nn

from learner.ppo.experience import ExperienceBatch
from learner.ppo.policy import PolicyWithCritic
from learner.ranks.checkpoint import load_checkpoint, save_checkpoint
from learner.ranks.distributed import clip_gradients, shard
from learner.ranks.optimizer import make_optimizer
from tests.bench.batch import batch
from tests.fakes import save_tiny_model
from tests.gpu_check.models import learner_config
from tests.gpu_check.run import Run
from tests.saving import mark


def check(run: Run) -> None:
    if not run.on_gpu:
        run.skip("sharded", "needs a GPU")
        return
    run.part("sharded, empty shards", check_empty_shards)
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{run.scratch}/rendezvous", rank=0, world_size=1)
    try:
        run.part("sharded, an update", check_update)
    finally:
        dist.destroy_process_group()


def check_empty_shards(run: Run) -> None:
    """A value head has one row, so every rank but the first holds none of it."""
    shards = [nn.Parameter(torch.zeros(*shape, device=run.device)) for shape in ((0, 64), (0,), (8, 64))]
    for part in shards:
        part.grad = torch.ones_like(part)
    norm = clip_gradients(shards, 1.0)
    torch.optim.AdamW(shards, lr=0.1, fused=True).step()
    moved = bool((shards[2] < 0).all())
    run.expect(math.isclose(norm, 512**0.5, rel_tol=1e-5) and moved, "sharded: clipping and AdamW with empty shards")


def check_update(run: Run) -> None:
    model = save_tiny_model(run.scratch / "sharded")
    cfg = learner_config(run, model)
    network = PolicyWithCritic.load(model, cfg.learner, torch.device("cpu"), has_critic=True, seed=0)
    before = {name: tensor.clone() for name, tensor in network.policy_tensors()}
    shard(network, [network.value_head], precision="bf16", device=run.device)
    gathered = dict(network.policy_tensors())
    same = all(torch.equal(before[name].bfloat16(), gathered[name].cpu()) for name in before)
    run.expect(same, "sharded: gathers the weights in bfloat16")
    optimizer = make_optimizer(network.parts(cfg.optimizer), cfg.optimizer)
    table = batch(str(model), rollouts=8, shortest=16, longest=48)
    sequences = ExperienceBatch.from_table(table).sequences.to(run.device)
    for _ in range(2):  # two micro-batches
        with torch.autocast("cuda", torch.bfloat16):
            logprobs, entropy, values = network(sequences, temperature=1.0)
        (logprobs.sum() + entropy.sum() + values.sum()).backward()
    norm = clip_gradients(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    run.expect(norm > 0, f"sharded: an update of two micro-batches, gradient norm {norm:.3g}")
    directory = run.scratch / "sharded-checkpoint"
    mark(directory, save_checkpoint(directory, network, optimizer, {"step": 1}))
    numbers = load_checkpoint(directory, network, optimizer)
    run.expect(numbers == {"step": 1}, "sharded: a checkpoint, written and read")
