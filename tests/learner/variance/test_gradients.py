"""Gradients of parts of a batch against gradients of single responses, computed one after another by autograd."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import UserError
from learner.ppo.experience import ExperienceBatch
from learner.ppo.learner import Learner
from learner.variance import account as module
from learner.variance.account import account
from learner.variance.estimators import estimators_of
from learner.variance.gradients import Products, equal_parts, gradient_products
from learner.variance.sketch import GradientSketches
from tests.fakes import save_tiny_model, tiny_config
from tests.learner.ppo.test_episodes import EPISODES, episodes
from tests.learner.ppo.test_learner import MASK, OTHERWISE, UNUSUAL, WITHOUT_CRITIC, SlowLearner, grouped, varied_batch

TABLE = grouped(varied_batch(0))  # eight responses to four prompts; one response is empty
TABLES = {
    "episodes": grouped(episodes(0)),
    "contexts": grouped(episodes(0, contexts=True)),
}  # of the kinds that have another
KINDS: dict[str, dict[str, Any]] = {
    "otherwise-separate": {**OTHERWISE, "learner": {"critic": "separate"}},
    "mask": MASK,
    "group": WITHOUT_CRITIC["group"],
    "episodes": EPISODES,
    "contexts": EPISODES,
    "returns-checkpointing": {**WITHOUT_CRITIC["returns"], "learner": {"gradient_checkpointing": True}},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def learner_of(model, kind: str) -> Learner:
    other = KINDS[kind]
    settings = {key: {**old, **other.get(key, {})} if isinstance(old, dict) else old for key, old in UNUSUAL.items()}
    settings["reward"].setdefault("sources", [{"name": "a_words", "function": "tests.tasks:a_words"}])
    settings |= {section: other[section] for section in ("prompts", "environment") if section in other}
    learner = Learner(tiny_config(model, rollouts_per_step=8, **settings))
    if learner.network.value_head is not None:
        torch.manual_seed(0)
        torch.nn.init.normal_(learner.network.value_head.weight, std=0.3)
    return learner


class Slow:
    """Everything by definition: the advantages of one estimator, and the policy gradient of each response."""

    def __init__(self, model, learner: Learner, ppo: Any, rows: list[dict[str, Any]]) -> None:
        self.ppo, self._rows = ppo, rows
        slow = SlowLearner(model, learner.cfg.model_copy(update={"ppo": ppo}))
        if ppo.has_critic:  # else the values are zeros
            slow.value_head = [p.detach().clone() for p in learner.network.value_head.parameters()]
        self.tokens = slow.targets(rows)
        self._slow = slow

    def advantages(self) -> list[float]:
        return [token["advantage"] for row in self.tokens for token in row]

    def gradients(self, shift: float, scale: float) -> np.ndarray:
        """[8, weights]: of each response, with advantages (A - shift) / scale, divided by the tokens of the batch."""
        found = []
        for row, fixed in zip(self._rows, self.tokens, strict=True):
            objective = torch.zeros((), requires_grad=True) * 1
            for now, token in zip(self._slow.tokens(row), fixed, strict=True):
                ratio = (now["logprob"] - token["base"]).exp()
                low, high = self.ppo.ratio_bounds
                counts = self.ppo.policy_loss == "clip" or low <= ratio <= high
                objective = objective + counts * token["weight"] * (token["advantage"] - shift) / scale * ratio
            parameters = list(self._slow.policy.parameters())
            each = torch.autograd.grad(objective, parameters, allow_unused=True) if fixed else [None] * len(parameters)
            flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, each, strict=True)]
            found.append(torch.cat([g.flatten() for g in flat]).double().numpy())
        return np.stack(found) / len(self.advantages())


@pytest.mark.parametrize("kind", KINDS)
def test_parts_have_the_gradients_of_their_responses(model, kind, monkeypatch):
    learner, table = learner_of(model, kind), TABLES.get(kind, TABLE)
    seen: list[tuple[Products, list[np.ndarray]]] = []

    def kept(learner, batch, fixed, advantages, parts, **options):
        seen.append((gradient_products(learner, batch, fixed, advantages, parts, **options), parts))
        return seen[0][0]

    monkeypatch.setattr(module, "gradient_products", kept)
    record = account(learner, table)
    [(products, parts)] = seen
    assert len(parts) == 4
    groups = ExperienceBatch.from_table(table).groups
    estimators, _ = estimators_of(learner.cfg.ppo, groups)
    assert len(estimators) == (8 if learner.cfg.ppo.has_critic else 2)
    vectors = {}
    for one in estimators:
        slow = Slow(model, learner, one.ppo, table.to_pylist())
        shift, scale = np.mean(slow.advantages()), np.std(slow.advantages())
        figures = record["estimators"][one.name]
        assert figures["mean"] == pytest.approx(shift, rel=1e-4, abs=1e-6)
        assert figures["variance"]["value"] == pytest.approx(scale**2, rel=1e-4)
        for which, (a, b) in (("whitened", (shift, scale)), ("unwhitened", (0.0, 1.0))):
            each = slow.gradients(a, b)
            g = len(parts) * np.stack([each[rows].sum(0) for rows in parts])
            found = getattr(products, which)(one.name)
            assert found == pytest.approx(g @ g.T, rel=2e-4, abs=2e-4 * np.abs(g @ g.T).max())
            assert figures[which]["gradient_norm"] == pytest.approx(np.linalg.norm(each.sum(0)), rel=1e-3)
            error = math.sqrt(((g - g.mean(0)) ** 2).sum() / (len(parts) - 1) / len(parts))
            assert figures[which]["standard_error"] == pytest.approx(error, rel=1e-3)
            vectors[which, one.name] = g
    first, last = estimators[0].name, estimators[-1].name
    for which in ("whitened", "unwhitened"):
        between = vectors[which, first] @ vectors[which, last].T
        found = getattr(products, which)(first, last)
        assert found == pytest.approx(between, rel=2e-4, abs=2e-4 * np.abs(between).max())
    assert [name for name, figures in record["estimators"].items() if figures["is_runs_own"]] == [
        {"group": "group", "returns-checkpointing": "none"}.get(kind, "critic, lam 0.6")
    ]


def test_the_gradient_is_that_of_the_learners_own_update(model):
    """Without a critic and in one minibatch: the norm before clipping is a metric of the update."""
    settings = {"ppo": {"advantages": "returns", "ppo_epochs": 1, "minibatches": 1}, "seed": 3}
    cfg = tiny_config(model, rollouts_per_step=8, num_steps=10, **settings)
    found = account(Learner(cfg), varied_batch(1))["estimators"]["none"]["whitened"]
    assert found["gradient_norm"] == pytest.approx(Learner(cfg).update(varied_batch(1))["ppo/grad_norm"], rel=1e-5)


def test_every_part_has_whole_prompts_and_each_row_is_in_one():
    groups = np.random.default_rng(0).integers(0, 23, 100)
    parts = equal_parts(groups, 5, seed=1)
    assert sorted(np.concatenate(parts).tolist()) == list(range(100))
    prompts = [set(groups[rows]) for rows in parts]
    assert sum(map(len, prompts)) == len(set(groups))
    assert {len(part) for part in prompts} == {4, 5}
    assert [rows.tolist() for rows in equal_parts(groups, 5, seed=1)] == [rows.tolist() for rows in parts]
    assert [rows.tolist() for rows in equal_parts(groups, 5, seed=2)] != [rows.tolist() for rows in parts]


def test_too_few_prompts_give_no_account(model):
    learner = learner_of(model, "returns-checkpointing")
    with pytest.raises(UserError, match=r"responses to 3 prompts; --variance needs at least 4: .* --steps"):
        account(learner, TABLE.slice(0, 6))


def sketches(gradients: torch.Tensor, shapes: list[tuple[int, ...]], room: int) -> GradientSketches:
    """Of each row of `gradients`, given in two halves, as two micro-batches would."""
    parameters = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    found = GradientSketches(parameters, len(gradients), seed=0, room=room)
    for number, row in enumerate(gradients):
        for half in (0.25, 0.75):
            for parameter, part in zip(parameters, row.split([p.numel() for p in parameters]), strict=True):
                parameter.grad = half * part.view(parameter.shape)
            found.add(number)
    return found


def test_with_enough_room_inner_products_are_exact():
    g = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    found = sketches(g, [(5, 8), (30,)], room=4 * 3 * 70)
    assert found.is_exact
    assert torch.allclose(found.products(), (g @ g.T).double(), atol=1e-5)


def test_with_less_room_they_are_right_on_average_and_nearly_right_each():
    """Gradients of matrices: outer products, whose rows are multiples of each other. All numbers are positive, so sums
    without random signs would be far too large."""
    torch.manual_seed(0)
    shapes = [(200, 64), (64, 100), (33,)]
    g = torch.stack(
        [torch.cat([torch.outer(torch.randn(a), torch.randn(b)).flatten() for a, b in shapes[:2]] + [torch.randn(33)])
         for _ in range(6)]
    )  # fmt: skip
    g = g.abs()
    found = sketches(g, shapes, room=4 * 6 * 2001)
    assert (found.width, found.is_exact) == (2001, False)
    exact = (g.double() @ g.double().T).numpy()
    norms = np.sqrt(np.diag(exact))
    errors = (found.products().numpy() - exact) / np.outer(norms, norms)
    assert np.abs(errors).max() < 5 * math.sqrt(2 / 2001)
    assert 0.1 < np.sqrt((errors**2).mean()) / math.sqrt(2 / 2001) < 1.5
