"""Training of a critic: updates against a slow derivation, and a shared trunk against the closed-form solution."""

from __future__ import annotations

import math
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from common.config.ppo import Config
from learner.critic.evaluation import EXPLAINED
from learner.critic.returns import realised_returns
from learner.critic.rollouts import Rollouts, choose_steps
from learner.critic.trainer import CriticTrainer
from learner.loop.checkpoints import write_marker
from learner.ppo.critic_files import CriticBasis, TrainedCritic, load_head, read_critic
from learner.ppo.experience import ExperienceBatch
from learner.ppo.policy import PolicyWithCritic
from learner.ranks.distributed import whole
from tests.contexts import contexts_of
from tests.fakes import tiny_config
from tests.learner.critic.journals import context_table, write_journal
from tests.learner.ranks.test_distributed import LIMIT_S, run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

UNUSUAL = {"betas": (0.8, 0.9), "weight_decay": 0.1, "max_grad_norm": 0.3, "schedule": "linear", "warmup_steps": 1,
           "eps": 1e-3, "value_head_learning_rate": 2e-2, "critic_learning_rate": 4e-3}  # fmt: skip
BASIS = CriticBasis("separate", "m", "t", (), "mean_std", 5.0, 1.0, 0.1, "k1", {})


def config(model: Path, kind: str, *, optimizer: dict[str, Any] | None = None, **learner: Any) -> Config:
    return tiny_config(
        model,
        rollouts_per_step=8,
        ppo={"minibatches": 1, "gamma": 0.95},
        learner={"critic": kind, **learner},
        optimizer=optimizer or UNUSUAL,
    )


def make_trainer(cfg: Config, rollouts: Rollouts, run: Path, *, num_steps: int = 5) -> CriticTrainer:
    return CriticTrainer(cfg, num_steps, rollouts.moments, run)


def remember(trainer: CriticTrainer, rollouts: Rollouts) -> None:
    if trainer.network.is_shared:
        for table in rollouts.chunks(np.arange(len(rollouts)), 16):
            trainer.remember(table)


def batches(rollouts: Rollouts) -> list[Any]:
    """Three batches, of eight, five and one rollouts. The last one leaves a second rank without work."""
    return [rollouts.table(np.array(rows)) for rows in ([3, 40, 8, 21, 0, 17, 30, 46], [5, 6, 7, 44, 2], [11])]


def trained(trainer: CriticTrainer) -> torch.Tensor:
    return torch.cat([whole(p).flatten() for p in trainer.network.parameters() if p.requires_grad])


class SlowCritic:
    """Sequence by sequence with transformers, and AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2)."""

    def __init__(self, cfg: Config, rollouts: Rollouts) -> None:
        self.cfg, self.moments, self.step = cfg, rollouts.moments, 0
        self.body = AutoModel.from_pretrained(cfg.model.path, dtype=torch.float32).eval()
        self.head = torch.nn.Linear(64, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        trains_body = cfg.learner.critic == "separate"
        self.weights = [(p, cfg.optimizer.value_head_learning_rate) for p in self.head.parameters()]
        self.weights += [(p, cfg.optimizer.critic_learning_rate) for p in self.body.parameters() if trains_body]
        self.means = [(0.0, 0.0) for _ in self.weights]

    def states(self, row: dict[str, Any]) -> torch.Tensor:
        found = [
            self.body(torch.tensor([ids])).last_hidden_state[0, [place - 1 for place in places]]
            for ids, places in contexts_of(row)
        ]
        return torch.cat(found)

    def update(self, table: Any, scale: float) -> dict[str, float]:
        opt, cfg = self.cfg.optimizer, self.cfg
        batch = ExperienceBatch.from_table(table)
        _, returns = realised_returns(batch, self.moments, reward=cfg.reward, kl=cfg.kl, gamma=cfg.ppo.gamma)
        values = torch.cat([self.head(self.states(row)).squeeze(1) for row in table.to_pylist()])
        loss = ((values - returns[batch.mask]) ** 2).mean() / 2
        gradients = torch.autograd.grad(loss, [p for p, _ in self.weights])
        norm = math.sqrt(sum((g.double() ** 2).sum().item() for g in gradients))
        self.step += 1
        with torch.no_grad():
            for i, ((p, rate), g) in enumerate(zip(self.weights, gradients)):
                g, (m, v) = g * min(1.0, opt.max_grad_norm / norm), self.means[i]
                m, v = opt.betas[0] * m + (1 - opt.betas[0]) * g, opt.betas[1] * v + (1 - opt.betas[1]) * g**2
                self.means[i] = m, v
                decay = opt.weight_decay * p if p.ndim == 2 else 0
                corrected = m / (1 - opt.betas[0] ** self.step), v / (1 - opt.betas[1] ** self.step)
                p -= rate * scale * (corrected[0] / (corrected[1].sqrt() + opt.eps) + decay)
        wanted, found = returns[batch.mask].double(), values.detach().double()
        rates = {"separate": opt.critic_learning_rate, "shared": opt.value_head_learning_rate}
        return {
            "value/loss": loss.item(),
            EXPLAINED: 1 - ((wanted - found).var() / wanted.var()).item(),
            "critic/grad_norm": norm,
            "critic/learning_rate": scale * rates[cfg.learner.critic],
            "learner/tokens": sum(len(row["prompt_ids"] + row["response_ids"]) for row in table.to_pylist()),
        }


@pytest.mark.parametrize("micro_batch_tokens", [24, 4096])
@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_updates_agree_with_a_slow_derivation(model, rollouts, tmp_path, kind, micro_batch_tokens):
    cfg = config(model, kind, micro_batch_tokens=micro_batch_tokens)
    trainer, slow = make_trainer(cfg, rollouts, tmp_path), SlowCritic(cfg, rollouts)
    remember(trainer, rollouts)
    for table, scale in zip(batches(rollouts)[:2] * 2, [1 / 2, 1, 3 / 4, 1 / 2]):  # one step of warm-up, then to zero
        expected, found = slow.update(table, scale), trainer.update(table)
        assert found.pop("time/learn_s") > 0
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
        for parameter, (other, _) in zip(trainer_weights(trainer), slow.weights, strict=True):
            torch.testing.assert_close(parameter, other, atol=1e-6, rtol=1e-4)
    assert trainer.step == 4
    table = batches(rollouts)[0]
    for row, values in zip(table.to_pylist(), trainer.values(table)):
        expected = slow.head(slow.states(row)).detach().squeeze(1).numpy()
        assert values[: len(expected)] == pytest.approx(expected, abs=1e-5)
        assert not values[len(expected) :].any()
        assert np.abs(expected).max() > 1e-3


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_a_critic_learns_from_each_context_by_itself(model, tmp_path, kind):
    write_journal(tmp_path, [context_table(step) for step in range(2)])
    rollouts = Rollouts([choose_steps(tmp_path, slice(None))])
    cfg = config(model, kind, micro_batch_tokens=60)
    trainer, slow = make_trainer(cfg, rollouts, tmp_path), SlowCritic(cfg, rollouts)
    remember(trainer, rollouts)
    for first, scale in zip((0, 12), [1 / 2, 1]):
        table = rollouts.table(np.arange(first, first + 12))
        assert sum(len(contexts_of(row)) > 1 for row in table.to_pylist()) > 3
        expected, found = slow.update(table, scale), trainer.update(table)
        del found["time/learn_s"]
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
        for parameter, (other, _) in zip(trainer_weights(trainer), slow.weights, strict=True):
            torch.testing.assert_close(parameter, other, atol=1e-6, rtol=1e-4)


def trainer_weights(trainer: CriticTrainer) -> list[torch.nn.Parameter]:
    network = trainer.network
    body = [] if network.is_shared else list(network.body.parameters())
    return [*network.value_head.parameters(), *body]


def test_a_head_on_a_shared_trunk_reaches_the_least_squares_solution(model, rollouts, tmp_path):
    optimizer = {"value_head_learning_rate": 0.3, "schedule": "cosine", "max_grad_norm": 1e9, "betas": (0.9, 0.99)}
    cfg = config(model, "shared", optimizer=optimizer)
    trainer, slow = make_trainer(cfg, rollouts, tmp_path, num_steps=400), SlowCritic(cfg, rollouts)
    remember(trainer, rollouts)
    everything = rollouts.table(np.arange(len(rollouts)))
    for _ in range(400):
        loss = trainer.update(everything)["value/loss"]
    batch = ExperienceBatch.from_table(everything)
    _, returns = realised_returns(batch, rollouts.moments, reward=cfg.reward, kl=cfg.kl, gamma=cfg.ppo.gamma)
    with torch.no_grad():
        states = torch.cat([slow.states(row) for row in everything.to_pylist()]).double().numpy()
    design = np.hstack([states, np.ones((len(states), 1))])  # the bias
    wanted = returns[batch.mask].double().numpy()
    solution, *_ = np.linalg.lstsq(design, wanted)
    best = ((design @ solution - wanted) ** 2).mean() / 2
    assert best <= loss < best + 0.01 * wanted.var() / 2
    assert best < 0.8 * wanted.var() / 2  # a constant would not do


def test_a_separate_critic_is_saved_and_loaded_as_it_is(model, rollouts, tmp_path):
    cfg = config(model, "separate")
    trainer = make_trainer(cfg, rollouts, tmp_path)
    trainer.update(batches(rollouts)[0])
    trainer.save_critic(tmp_path / "critic", TrainedCritic(BASIS, rollouts.moments, [], []))
    assert read_critic(tmp_path / "critic").score_moments == rollouts.moments
    loaded = PolicyWithCritic.load(
        model, cfg.learner, torch.device("cpu"), has_critic=True, seed=0, critic=tmp_path / "critic"
    )
    assert loaded.critic_body is not None
    for (name, found), expected in zip(loaded.critic_body.named_parameters(), trainer.network.body.parameters()):
        assert torch.equal(found, expected), name
    assert torch.equal(loaded.value_head.weight, trainer.network.value_head.weight)


@pytest.mark.parametrize(
    ("learner", "kept"),
    [({"lora": {"rank": 4, "alpha": 8}}, "mlp.up_proj"), ({"critic_frozen": "attention"}, "self_attn.q_proj")],
)
def test_adapters_and_layers_around_frozen_ones_learn_and_are_saved(model, rollouts, tmp_path, learner, kept):
    trainer, table = (
        make_trainer(config(model, "separate", **learner), rollouts, tmp_path),
        rollouts.table(np.arange(16)),
    )

    def weights() -> dict[str, torch.Tensor]:
        named = trainer.network.body.named_parameters()
        return {name.replace(".base_layer", ""): p.detach().clone() for name, p in named}

    before = weights()[f"layers.0.{kept}.weight"]
    losses = [trainer.update(table)["value/loss"] for _ in range(4)]
    assert losses[-1] < losses[0]
    assert torch.equal(weights()[f"layers.0.{kept}.weight"], before)
    trainer.save_critic(tmp_path / "critic", TrainedCritic(BASIS, rollouts.moments, [], []))
    whole_critic = config(model, "separate").learner
    where = {"critic": tmp_path / "critic", "has_critic": True, "seed": 0}
    loaded = PolicyWithCritic.load(model, whole_critic, torch.device("cpu"), **where)
    with torch.no_grad():
        _, _, values = loaded(ExperienceBatch.from_table(table).sequences, temperature=1.0)
    np.testing.assert_allclose(trainer.values(table), values.numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_a_restored_trainer_continues_bit_for_bit(model, rollouts, tmp_path, kind):
    trainers = [make_trainer(config(model, kind), rollouts, tmp_path) for _ in range(2)]
    for trainer in trainers:
        remember(trainer, rollouts)
    first, second, third = batches(rollouts)
    trainers[0].update(first)
    files = trainers[0].save(tmp_path / "checkpoint")
    marker = {"step": 1, "journal": None, "voids": [], "identity": {}, "files": files}
    write_marker(tmp_path / "checkpoint", marker)
    assert trainers[1].restore(tmp_path / "checkpoint") == 1
    for trainer in trainers:
        trainer.update(second)
        trainer.update(third)
    assert torch.equal(trained(trainers[0]), trained(trainers[1]))
    if kind == "shared":  # the trunk is not in a checkpoint
        assert (tmp_path / "checkpoint/weights-00000.safetensors").stat().st_size < 2000


def results(trainer: CriticTrainer, rollouts: Rollouts, target: Path) -> dict[str, Any]:
    remember(trainer, rollouts)
    stats = [trainer.update(table) for table in batches(rollouts)]
    trainer.save_critic(target, TrainedCritic(BASIS, rollouts.moments, [], []))
    values = [trainer.values(table) for table in batches(rollouts)]
    return {"stats": stats, "weights": trained(trainer), "values": values}


def on_two_ranks(rank: int, ready: Barrier, directory: Path, model: Path, rollouts: list[Any]) -> None:
    """One rank's process: both kinds of critic, with more than one micro-batch in a step."""
    data = Rollouts(rollouts)
    ready.wait()
    for number, kind in enumerate(("separate", "shared")):
        cfg = config(model, kind, micro_batch_tokens=24, timeout_s=LIMIT_S / 2)
        trainer = make_trainer(cfg, data, directory)
        trainer.join(rank, 2, f"file://{directory}/rendezvous-{number}")
        found = results(trainer, data, directory / kind)
        torch.save(found, directory / f"{kind}-{rank}.pt")
        if kind == "shared":
            assert 0 < sum(row in trainer._states for row in range(len(data))) < len(data)
        torch.distributed.destroy_process_group()


def test_two_ranks_learn_the_same_as_one(model, rollouts, tmp_path):
    run_ranks(on_two_ranks, tmp_path, model, rollouts.parts)
    for kind in ("separate", "shared"):
        one = results(make_trainer(config(model, kind), rollouts, tmp_path), rollouts, tmp_path / "one")
        for rank in range(2):
            found = torch.load(tmp_path / f"{kind}-{rank}.pt", weights_only=False)
            for stats, expected in zip(found["stats"], one["stats"], strict=True):
                timeless = {**stats, "time/learn_s": 0}
                assert timeless == pytest.approx({**expected, "time/learn_s": 0}, rel=1e-4, abs=1e-6)
            torch.testing.assert_close(found["weights"], one["weights"], atol=1e-5, rtol=1e-4)
            for values, expected in zip(found["values"], one["values"], strict=True):
                np.testing.assert_allclose(values, expected, atol=1e-5)
        heads = [torch.nn.Linear(64, 1) for _ in range(2)]
        for head, written in zip(heads, (tmp_path / kind, tmp_path / "one")):
            load_head(written, head)
        torch.testing.assert_close(heads[0].weight, heads[1].weight, atol=1e-5, rtol=1e-4)
