"""The loop of `ratchet train-critic`: evaluations, the best critic, the end, and deaths at every call."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from common.config.ppo import Config
from common.errors import BatchError, UserError
from common.files import read_records
from learner.critic.evaluation import EXPLAINED, CriticEvaluation, Predicted, evaluate_critic
from learner.critic.rollouts import Rollouts, choose_steps
from learner.critic.trainer import CriticTrainer
from learner.critic.training import CriticData, CriticRun, train_critic
from learner.ppo.critic_files import read_critic
from learner.ppo.critic_quality import critic_quality
from tests.fakes import tiny_config
from tests.learner.critic.journals import step_table, write_journal
from tests.learner.critic.test_trainer import BASIS, trained


class Killed(Exception):
    """The process is gone."""


class OneProcess:
    """The group of ranks, around one trainer that lives here. Dies at the call it is told, before or after its work."""

    def __init__(self, trainer: CriticTrainer, *, dies: tuple[int, str] | None = None) -> None:
        self.trainer, self.calls, self._dies = trainer, [], dies

    @property
    def step(self) -> int:
        return self.trainer.step

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any) -> Any:
            number = len(self.calls)
            self.calls.append(name)
            if self._dies == (number, "before"):
                raise Killed
            result = getattr(self.trainer, name)(*arguments)
            if self._dies == (number, "after"):
                raise Killed
            return result

        return call


def config(model: Path, kind: str = "shared", **training: Any) -> Config:
    return tiny_config(
        model,
        rollouts_per_step=11,  # of 32: three steps a pass
        ppo={"minibatches": 1},
        learner={"critic": kind},
        optimizer={"value_head_learning_rate": 1e-2, "critic_learning_rate": 1e-3},
        checkpoint={"every": 2},
        critic_training={"passes": 3, "patience": 3, "heldout_share": 0.3, **training},
    )


def run_once(directory: Path, cfg: Config, rollouts: Rollouts, *, dies: tuple[int, str] | None = None):
    """Trains in `directory` from its newest checkpoint. Returns the group, dead or not, and the evaluations."""
    directory.mkdir(exist_ok=True)
    group = OneProcess(CriticTrainer(cfg, 9, rollouts.moments, directory), dies=dies)
    try:
        return group, asyncio.run(train_critic(CriticRun(CriticData.split(cfg, rollouts), directory, group, BASIS)))
    except Killed:
        return group, None


def timeless(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k.split("/")[0] != "time"} for record in read_records(path)]


@pytest.fixture(scope="module", params=["shared", "separate"])
def whole(request, model, rollouts, tmp_path_factory):
    cfg, directory = config(model, request.param), tmp_path_factory.mktemp("whole")
    return (cfg, directory, *run_once(directory, cfg, rollouts))


def test_it_evaluates_before_the_first_pass_and_after_each(whole):
    cfg, directory, group, evaluations = whole
    assert [evaluation.epoch for evaluation in evaluations] == [0, 1, 2, 3]
    assert evaluations[0].explained == 0.0  # a head of zeros
    records = read_records(directory / "evaluations.jsonl")
    assert [record["step"] for record in records] == [0, 3, 6, 9]
    assert records[2][EXPLAINED] == evaluations[2].explained
    assert [record["epoch"] for record in read_records(directory / "metrics.jsonl")] == pytest.approx(
        [i / 3 for i in range(1, 10)]
    )
    assert group.calls.count("remember") == (1 if cfg.learner.critic == "shared" else 0)
    assert group.calls.count("update") == 9


def test_the_record_of_the_critic_says_what_it_was_trained_on(whole, rollouts):
    _, directory, _, evaluations = whole
    record = read_critic(directory / "critic")
    assert (record.basis, record.score_moments) == (BASIS, rollouts.moments)
    assert [(part["rollouts"], part["first"], part["end"]) for part in record.trained_on] == [(48, 0, 6)]
    best = max(range(4), key=lambda i: evaluations[i].r2)
    assert [one["step"] for one in record.passes] == [0, 3, 6, 9][: best + 1]
    assert best > 0


def test_a_batch_that_cannot_be_learned_from_names_the_rates(whole, rollouts, tmp_path):
    async def update(batch):
        raise BatchError("the gradient is not finite")

    cfg = whole[0]
    group = OneProcess(CriticTrainer(cfg, 9, rollouts.moments, tmp_path))
    group.update = update
    network = "optimizer.critic_learning_rate or " if cfg.learner.critic == "separate" else ""
    with pytest.raises(UserError, match=f"a lower {network}optimizer.value_head_learning_rate"):
        asyncio.run(train_critic(CriticRun(CriticData.split(cfg, rollouts), tmp_path, group, BASIS)))


def test_a_death_at_any_call_leads_to_the_same_bytes(whole, rollouts, tmp_path):
    cfg, expected, group, evaluations = whole
    for number in range(0, len(group.calls), 2 if cfg.learner.critic == "shared" else 5):
        directory = tmp_path / str(number)
        dead, _ = run_once(directory, cfg, rollouts, dies=(number, "before" if number % 4 else "after"))
        assert len(dead.calls) == number + 1
        assert not (directory / "critic").exists()
        resumed, found = run_once(directory, cfg, rollouts)
        assert found == evaluations
        assert torch.equal(trained(resumed.trainer), trained(group.trainer))
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            assert timeless(directory / name) == timeless(expected / name), (number, name)
        files = [{path.name: path.read_bytes() for path in (d / "critic").iterdir()} for d in (directory, expected)]
        assert files[0] == files[1], number


def test_it_ends_after_passes_without_a_rise_and_keeps_the_best(model, rollouts, tmp_path, monkeypatch):
    shares = iter([0.0, 0.25, 0.5, 0.125, 0.5, 0.75])
    weights = []

    async def next_one(run, step):
        [values] = [await run.trainer.values(rollouts.table(run.data.heldout))]
        evaluation = evaluate_critic(
            [Predicted.of(values, values, np.zeros(len(values)), np.ones(values.shape, bool))],
            step=step,
            epoch=step / 3,
        )
        figures = {EXPLAINED: 0.5, "value/returns_var/realised": 2.0}  # so R2 is 1 - loss
        return replace(evaluation, loss=1 - next(shares), figures=figures)

    cfg = config(model, passes=9, patience=2)
    monkeypatch.setattr(CriticRun, "_evaluation", next_one)
    group = OneProcess(CriticTrainer(cfg, 27, rollouts.moments, tmp_path))
    save = group.trainer.save_critic
    group.trainer.save_critic = lambda *arguments: (weights.append(group.step), save(*arguments))
    found = asyncio.run(train_critic(CriticRun(CriticData.split(cfg, rollouts), tmp_path, group, BASIS)))
    assert [evaluation.r2 for evaluation in found] == [0.0, 0.25, 0.5, 0.125, 0.5]  # an equal one is no rise
    assert weights == [0, 3, 6]
    assert [one["value/r2"] for one in read_critic(tmp_path / "critic").passes] == [0.0, 0.25, 0.5]
    again = OneProcess(CriticTrainer(cfg, 27, rollouts.moments, tmp_path))
    assert asyncio.run(train_critic(CriticRun(CriticData.split(cfg, rollouts), tmp_path, again, BASIS))) == found
    assert "update" not in again.calls


def test_an_evaluation_joins_parts_of_several_widths():
    values = [np.array([[0.5, 1.0, 9.0]], np.float32), np.array([[2.0], [3.0]], np.float32)]
    masks = [np.array([[True, True, False]]), np.array([[True], [True]])]
    returns = [np.array([[1.0, 1.0, 0.0]], np.float32), np.array([[2.0], [5.0]], np.float32)]
    scores = [np.array([0.0]), np.array([1.0, 2.0])]
    parts = [Predicted.of(v, r, s, m) for v, r, s, m in zip(values, returns, scores, masks)]
    found = evaluate_critic(parts, step=6, epoch=2.0)
    assert (found.rollouts, found.tokens) == (3, 4)
    assert found.loss == pytest.approx((0.25 + 4) / 4 / 2)
    # Returns 1, 1, 2, 5: mean 2.25, variance 2.6875. Errors 0.5, 0, 0, 2: mean 0.625, variance 0.671875.
    assert found.explained == pytest.approx(1 - 0.671875 / 2.6875)
    assert found.r2 == pytest.approx(1 - (4.25 / 4) / 2.6875)  # lower: the mean value is 0.625 too low
    assert CriticEvaluation.from_record(found.record()) == found
    padded = [
        np.array([row + [7.0] * (3 - len(row)) for row in rows]) for rows in ([[0.5, 1], [2], [3]], [[1, 1], [2], [5]])
    ]
    expected = critic_quality(*padded, np.arange(3.0), np.arange(3) < np.array([[2], [1], [1]]))
    assert expected.items() <= found.figures.items()
    assert found.figures["value/returns_var/first"] == pytest.approx(np.var([1.0, 2.0, 5.0]))
    assert found.figures["value/returns_var/last"] == pytest.approx(np.var([1.0, 2.0, 5.0]))


@pytest.mark.parametrize(("empty", "message"), [(False, "all returns are 0"), (True, "all responses are empty")])
def test_returns_that_are_all_equal_are_refused(model, tmp_path, empty, message):
    table = step_table(0)
    place = table.column_names.index("score")
    table = table.set_column(place, table.field(place), pa.array([0.5] * 8))
    if empty:
        for name in ("response_ids", "rollout_logprobs", "policy_versions"):
            place = table.column_names.index(name)
            table = table.set_column(place, table.field(place), pa.array([[]] * 8, table.field(place).type))
    write_journal(tmp_path, [table])
    rollouts = Rollouts([choose_steps(tmp_path, slice(None))])
    data = CriticData.split(config(model), rollouts)
    with pytest.raises(UserError, match=rf"nothing that a critic could explain: in the 2 held-out rollouts {message}"):
        data.check_returns()


def test_returns_that_differ_are_accepted(model, rollouts, tmp_path):
    CriticData.split(config(model), rollouts).check_returns()
