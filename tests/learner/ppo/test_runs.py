"""Whole runs with each advantage estimator: the loop, a real learner and its policy's own responses, in one process."""

from __future__ import annotations

import asyncio
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.config.ppo import Config
from common.files import read_records
from common.model.lengths import Lengths
from common.types import Prompt, Rollout, RolloutRef, Score
from learner.loop.journal import Journal
from learner.loop.prompts import PromptRecord, PromptStream
from learner.loop.run import Run
from learner.loop.train_loop import train
from learner.ppo.advantages import ADVANTAGES
from learner.ppo.learner import Learner
from tests.fakes import FakeRoles, make_rollout, save_tiny_model, tiny_config

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

STEPS, LENGTH = 8, 3


class OneProcess(FakeRoles):
    """The roles around a real learner: its policy writes, and a response scores its share of tokens below 32."""

    def __init__(self, cfg: Config) -> None:
        super().__init__([])
        self.learner = Learner(cfg)

    async def write(self, prompt: Prompt) -> Rollout:
        sample_id, ids, logprobs = prompt.sample_id, prompt.token_ids.tolist(), []
        seed = 1000 * self.version + 100 * sample_id.epoch + 10 * sample_id.prompt + sample_id.replica
        generator = torch.Generator().manual_seed(seed)
        for _ in range(LENGTH):
            with torch.no_grad():
                logits = self.learner.network.policy(torch.tensor([ids]), lengths=Lengths([len(ids)])).logits[0, -1]
            ids.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
            logprobs.append(logits.log_softmax(-1)[ids[-1]].item())
        plain = make_rollout(prompt, ids[-LENGTH:], version=self.version)
        return Rollout(**{**vars(plain), "rollout_logprobs": np.array(logprobs, dtype=np.float32)})

    async def score(self, ref: RolloutRef) -> Score:
        share = float((ref.rollout.response_ids < 32).mean())
        return Score(share, {"a_words": share})

    async def update(self, table):
        stats = self.learner.update(table)
        self.step = self.learner.step
        return stats

    async def credit(self):
        return self.learner.credit()

    async def skip(self) -> None:
        self.step = self.learner.skip()

    async def rebuild(self) -> None:
        self.learner = Learner(self.learner.cfg)
        self.step = 0

    async def restore(self, directory: Path) -> None:
        self.step = self.learner.restore(directory)

    async def save(self, directory: Path) -> dict[str, str]:
        return self.learner.save(directory)


# By a name: settings of a run.
RUNS: dict[str, dict[str, Any]] = {
    **{name: {"advantages": name} for name in ADVANTAGES},
    "mask": {"policy_loss": "mask", "clip_eps_high": 0.4, "lam": "length", "lam_alpha": 0.5, "value_lam": 1.0},
}


def config(model: Path, name: str, num_steps: int) -> Config:
    return tiny_config(
        model,
        num_steps=num_steps,
        rollouts_per_step=16,
        prompts={"rollouts_per_prompt": 4},
        ppo={**RUNS[name], "minibatches": 2},
        optimizer={"learning_rate": 3e-3},
        evaluation={"prompts": 0},
        checkpoint={"every": 3, "keep": 9},
    )


def weights_of(learner: Learner) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in learner.network.policy.parameters()])


def run(
    directory: Path, model: Path, name: str, num_steps: int, roles_of: type[OneProcess] = OneProcess
) -> torch.Tensor:
    """Trains in `directory` up to `num_steps`. Returns the policy's weights."""
    cfg = config(model, name, num_steps)
    records = [PromptRecord(f"q{i}", np.array([3, 4 + i], dtype=np.int32), {}) for i in range(6)]
    prompts = PromptStream(records, seed=cfg.seed, rollouts_per_prompt=4)
    roles = roles_of(cfg)
    asyncio.run(train(Run(cfg, directory, prompts, [], roles, roles, roles, roles)))
    return weights_of(roles.learner)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=list(RUNS))
def whole(request, model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return request.param, run(directory, model, request.param, STEPS), directory


def curve(directory: Path) -> list[dict[str, float]]:
    return [
        {key: value for key, value in record.items() if not key.endswith("_s") and key != "time"}
        for record in read_records(directory / "metrics.jsonl")
    ]


def test_the_reward_rises_with_every_estimator(whole):
    scores = [record["rollout/score/mean"] for record in curve(whole[2])]
    assert np.mean(scores[-2:]) > np.mean(scores[:2]) + 0.15, scores


def test_only_runs_with_a_critic_log_its_metrics(whole):
    logged = {key for record in curve(whole[2]) for key in record if key.startswith("value/")}
    assert bool(logged) == (whole[0] in ("gae", "mask"))


def test_a_run_of_every_estimator_resumes_bit_for_bit(whole, model, tmp_path):
    name, weights, directory = whole
    run(tmp_path / "run", model, name, 5)
    shutil.rmtree(tmp_path / "run/checkpoints/step-000005")  # so that steps 3 and 4 are replayed from the journal
    assert torch.equal(run(tmp_path / "run", model, name, STEPS), weights)
    assert curve(tmp_path / "run") == curve(directory)


class Poisoned(OneProcess):
    """The second minibatches of steps 1 and 4 have a gradient of NaN: the first ones have changed the weights."""

    async def update(self, table):
        if self.learner.step in (1, 4):
            scales = iter([1.0, math.nan])
            head = self.learner.network.value_head.weight
            hook = head.register_hook(lambda gradient: next(scales, 1.0) * gradient)
            try:
                return await super().update(table)
            finally:
                hook.remove()
        return await super().update(table)


def test_a_run_with_poison_batches_ends_where_its_journal_leads(model, tmp_path):
    """Without a checkpoint before step 1, so that batch costs a new learner; before step 4 there is one."""
    found = run(tmp_path / "run", model, "gae", STEPS, Poisoned)
    journal = Journal(tmp_path / "run/journal")
    assert sorted(journal.voided) == [1, 4]
    slow = Learner(config(model, "gae", STEPS))
    for step in journal.since(0):
        if step.step in journal.voided:
            slow.skip()
        else:
            slow.update(step.table)
    assert torch.equal(found, weights_of(slow))
    assert [record["step"] for record in curve(tmp_path / "run")] == list(range(STEPS))
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert torch.equal(run(tmp_path / "run", model, "gae", STEPS), found)
