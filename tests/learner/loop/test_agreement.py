"""An engine that computes another policy than the learner is found, and rounding alone is accepted."""

from __future__ import annotations

import asyncio
import json
import math

import numpy as np
import pytest

from common.errors import RolloutLostError, UserError
from common.files import read_records
from common.types import PROBE_EPOCH
from learner.loop.agreement import MismatchBound, check_engines, mean_difference
from learner.loop.prompts import PromptRecord, PromptStream
from learner.loop.train_loop import train
from tests.fakes import FakeRoles, tiny_config
from tests.learner.loop.test_train_loop import make_run


def config(tmp_path, *, rounded=True, **overrides):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "made_up"}))
    (tmp_path / "model" / "model.safetensors").touch()
    precisions = {"generators": {"dtype": "bfloat16" if rounded else "float32"}}
    return tiny_config(tmp_path / "model", **{**precisions, **overrides})


class Apart(FakeRoles):
    """The learner's log-probabilities are these nats below the engine's."""

    def __init__(self, nats: float, lost: bool = False) -> None:
        super().__init__([])
        self._nats, self._lost = nats, lost
        self.asked: list[tuple[int, int]] = []

    async def generate(self, prompt, *, plain_tokens: int = 0):
        self.asked.append((prompt.sample_id.epoch, plain_tokens))
        return await super().generate(prompt, plain_tokens=plain_tokens)

    async def fetch(self, references):
        found = await super().fetch(references)
        return [RolloutLostError("gone"), *found[1:]] if self._lost else found

    async def policy_logprobs(self, rollouts):
        return [rollout.rollout_logprobs - np.float32(self._nats) for rollout in rollouts]


def records(count: int = 10):
    return [PromptRecord(f"q{i}", np.array([3, 4], dtype=np.int32), {}) for i in range(count)]


def check(cfg, roles) -> PromptStream:
    prompts = PromptStream(records(), seed=0, rollouts_per_prompt=2)
    asyncio.run(check_engines(cfg, "made_up", prompts.probes(4), roles, roles))
    return prompts


@pytest.mark.parametrize(("rounded", "nats"), [(True, 0.06), (True, -0.15), (False, 0.03), (False, 0.0)])
def test_what_rounding_explains_passes(tmp_path, rounded, nats):
    roles = Apart(nats)
    prompts = check(config(tmp_path, rounded=rounded), roles)
    assert roles.asked == [(PROBE_EPOCH, 32)] * 4
    fresh = PromptStream(records(), seed=0, rollouts_per_prompt=2)
    assert prompts.state() == fresh.state()
    assert [prompts.next().sample_id for _ in range(30)] == [fresh.next().sample_id for _ in range(30)]


@pytest.mark.parametrize(("rounded", "nats"), [(True, 0.3), (True, -3), (False, 0.15), (True, math.nan)])
def test_an_engine_that_computes_another_model_is_the_users_error(tmp_path, rounded, nats):
    with pytest.raises(UserError, match=r"a made_up model: .* of 8 sampled tokens differ .* docs/models.md") as error:
        check(config(tmp_path, rounded=rounded), Apart(nats))
    assert f"by {abs(nats):.3g} nats each" in str(error.value)


def test_a_temperature_below_1_magnifies_what_rounding_explains(tmp_path):
    # 0.3 nats are too many at temperature 1 (above); at 0.5 the logits' differences count twice.
    check(config(tmp_path, sampling={"temperature": 0.5}), Apart(0.3))
    with pytest.raises(UserError, match=r"rounding explains at most 0\.4\. Both"):
        check(
            tiny_config(tmp_path / "model", generators={"dtype": "bfloat16"}, sampling={"temperature": 0.5}), Apart(0.6)
        )


def test_answers_that_are_lost_do_not_count(tmp_path):
    with pytest.raises(UserError, match="of 6 sampled tokens"):
        check(config(tmp_path), Apart(1.0, lost=True))


def test_prompts_are_asked_again_when_every_answer_is_lost(tmp_path):
    class LostOnce(Apart):
        async def fetch(self, references):
            found = await super().fetch(references)
            return [RolloutLostError("gone")] * len(found) if len(self.asked) == 4 else found

    roles = LostOnce(3.0)
    with pytest.raises(UserError, match="of 8 sampled tokens differ"):
        check(config(tmp_path), roles)
    assert len(roles.asked) == 8


def test_the_difference_is_the_mean_over_all_tokens():
    # |-1.5 - -1| = 0.5, |-2 - -2| = 0, |-3 - -4| = 1: 1.5 over three tokens.
    rows = [np.float32([-1.5, -2]), np.float32([]), np.float32([-3])]
    others = [np.float32([-1, -2]), np.float32([]), np.float32([-4])]
    assert mean_difference(rows, others) == pytest.approx(0.5, abs=1e-7)
    assert mean_difference([], []) == 0
    assert math.isnan(mean_difference([np.float32([-np.inf])], [np.float32([-1])]))


@pytest.mark.parametrize(
    ("found", "stops_at"),
    [
        ([0.3, 0.3, 0.3, 0.3], 2),
        ([0.3, 0.3, 0.1, 0.3, 0.3, 0.3], 5),  # not above: the row begins again
        ([0.3, 0.3, 0.0, 0.3, 0.3], None),
        ([0.3, math.nan, 0.3], 2),
    ],
)
def test_the_bound_counts_steps_in_a_row(tmp_path, found, stops_at):
    bound = MismatchBound(config(tmp_path, ppo={"max_mismatch_kl": 0.1, "max_mismatch_steps": 3}))
    for step, value in enumerate(found):
        if step == stops_at:
            with pytest.raises(UserError, match=rf"mismatch/kl \({value:.3g} .*\(0.1\) in 3 steps in a row"):
                bound.check({"mismatch/kl": value})
            return
        bound.check({"mismatch/kl": value})
    assert stops_at is None


def test_without_a_bound_no_mismatch_stops_a_run(tmp_path):
    bound = MismatchBound(config(tmp_path, ppo={"max_mismatch_kl": 0, "max_mismatch_steps": 1}))
    bound.check({"mismatch/kl": 100.0})


def test_the_likely_causes_are_those_of_the_settings(tmp_path):
    exact = config(tmp_path, rounded=False, ppo={"max_mismatch_steps": 1})
    told = {
        "top_k": {"sampling": {"top_k": 5}},
        "temperature = 0.1": {"sampling": {"temperature": 0.1}},
        "max_staleness = 2": {"max_staleness": 2},
    }
    for cause in ("", *told):
        cfg = exact.model_copy()
        if cause:
            cfg = tiny_config(tmp_path / "model", **told[cause], ppo={"max_mismatch_steps": 1})
        with pytest.raises(UserError) as error:
            MismatchBound(cfg).check({"mismatch/kl": 1.0})
        assert all((other in str(error.value)) == (other == cause) for other in told)
        assert "vLLM may compute this kind of model differently" in str(error.value)


def test_a_run_whose_mismatch_stays_stops_after_its_steps_are_on_disk(tmp_path):
    class Mismatched(FakeRoles):
        async def update(self, table):
            return {**await super().update(table), "mismatch/kl": 0.5}

    roles = Mismatched([])
    with pytest.raises(UserError, match="in 2 steps in a row"):
        asyncio.run(train(make_run(tmp_path, roles, num_steps=5, ppo={"max_mismatch_steps": 2})))
    assert roles.step == 2
    assert len(read_records(tmp_path / "metrics.jsonl")) == 2


def test_a_run_whose_engines_disagree_learns_nothing(tmp_path):
    class Wrong(FakeRoles):
        async def policy_logprobs(self, rollouts):
            return [rollout.rollout_logprobs + 2 for rollout in rollouts]

    roles = Wrong([])
    run = make_run(tmp_path, roles)
    run.cfg = config(tmp_path, num_steps=1)
    with pytest.raises(UserError, match="differ from the learner's by 2 nats each"):
        asyncio.run(train(run))
    assert roles.events == ["publish v0", "load v0"]
    assert run.journal.next_step == 0
