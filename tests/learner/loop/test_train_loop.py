"""The loop with fakes: the order of events, and the files that it writes."""

from __future__ import annotations

import asyncio
import itertools
import math
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from common.errors import GivenUpError, RankLostError, RolloutLostError, UserError
from common.files import read_records
from common.health.health import Event
from common.types import Prompt, Rollout, RolloutRef, SampleId, Score, Void
from learner.loop.answers import Answer
from learner.loop.evaluation import Evaluation
from learner.loop.prompts import PromptRecord, PromptStream
from learner.loop.run import Run
from learner.loop.train_loop import train
from tests.fakes import FakeRoles, make_prompt, tiny_config


def make_run(directory: Path, roles: FakeRoles, **overrides) -> Run:
    cfg = tiny_config("unused", **overrides)
    records = [PromptRecord(f"q{i}", np.array([3, 4], dtype=np.int32), {}) for i in range(10)]
    prompts = PromptStream(records, seed=cfg.seed, rollouts_per_prompt=1)
    heldout = [make_prompt(i) for i in range(2)]
    for i, prompt in enumerate(heldout):
        object.__setattr__(prompt, "sample_id", SampleId(-1, i, 0))
    return Run(cfg, directory, prompts, heldout, roles, roles, roles, roles)


def test_a_synchronous_step_generates_journals_learns_publishes_in_order(tmp_path):
    events: list[str] = []
    roles = FakeRoles(events)
    run = make_run(tmp_path, roles, num_steps=2)
    append = run.journal.append

    def journalled(*args, **kwargs):
        events.append(f"journal {append(*args, **kwargs)}")

    run.journal.append = journalled
    asyncio.run(train(run))

    assert events == [
        "publish v0", "load v0",  # and the engines are compared with the learner
        *["generate v0"] * 4, "journal 0", "update 0", "publish v1", "load v1",
        *["generate v1"] * 4, "journal 1", "update 1", "publish v2", "load v2", "save 2",
        "save policy",
    ]  # fmt: skip


SHARES = {"generators": {"gpus": 0.6}, "learner": {"gpus": 0.4}}


def test_engines_on_the_learners_gpu_sleep_during_each_update(tmp_path):
    events: list[str] = []
    asyncio.run(train(make_run(tmp_path, FakeRoles(events), num_steps=1, **SHARES)))
    assert events == [
        "wake", "publish v0", "load v0",
        *["generate v0"] * 4, "sleep", "update 0", "wake", "publish v1", "load v1", "save 1",
        "save policy",
    ]  # fmt: skip


@pytest.mark.parametrize("change", [{"max_staleness": 1}, {"learner": {"gpus": 0.5}}, {"generators": {"gpus": 0}}])
def test_engines_that_lend_nothing_stay_awake(tmp_path, change):
    roles = FakeRoles([], synchronous=False)
    asyncio.run(train(make_run(tmp_path, roles, num_steps=2, **{**SHARES, **change})))
    assert "sleep" not in roles.events


def test_synchronous_training_is_on_policy(tmp_path):
    roles = FakeRoles([])
    asyncio.run(train(make_run(tmp_path, roles, num_steps=4)))
    for step, table in enumerate(roles.tables):
        assert {version for row in table["policy_versions"].to_pylist() for version in row} == {step}
    assert [record["staleness/max"] for record in read_records(tmp_path / "metrics.jsonl")] == [0, 0, 0, 0]


def test_with_staleness_the_next_batch_is_written_during_learning(tmp_path):
    events: list[str] = []
    roles = FakeRoles(events, synchronous=False)
    run = make_run(tmp_path, roles, num_steps=6, max_staleness=1)
    asyncio.run(train(run))
    assert events[: events.index("update 0")].count("generate v0") == 8  # its own batch and the next
    for step, table in enumerate(roles.tables):
        versions = {version for row in table["policy_versions"].to_pylist() for version in row}
        assert versions <= {step - 1, step}
    records = read_records(tmp_path / "metrics.jsonl")
    assert [record["staleness/max"] for record in records] == [0, 1, 1, 1, 1, 1]
    assert all(record["staleness/min"] <= record["staleness/mean"] <= record["staleness/max"] for record in records)
    trained = [
        row for table in roles.tables for row in zip(table["epoch"].to_pylist(), table["prompt_index"].to_pylist())
    ]
    assert len(set(trained)) == len(trained) == 24
    assert sum(event.startswith("generate") for event in events) == 24  # none for a step that will not be


def test_responses_of_a_late_replica_are_voided_and_asked_again(tmp_path):
    """A replica that still samples with version 0 when version 2 is to be trained."""

    late: set[SampleId] = set()

    class Late(FakeRoles):
        async def write(self, prompt: Prompt) -> Rollout:
            rollout = await super().write(prompt)
            if self.version == 1 and len(late) < 2:
                late.add(prompt.sample_id)
                await asyncio.sleep(0.02)
                rollout.policy_versions[:] = -1
            return rollout

    roles = Late([], synchronous=False)
    run = make_run(tmp_path, roles, num_steps=6, max_staleness=1)
    asyncio.run(train(run))
    written = list(run.journal.since(0))
    voids = [void for step in written for void in step.voids]
    assert {name for name, _ in voids} == {str(i) for i in late}
    assert all("1 versions old" in reason for _, reason in voids)
    trained = [
        SampleId(*key)
        for table in roles.tables
        for key in zip(*(table[name].to_pylist() for name in ("epoch", "prompt_index", "replica")), strict=True)
    ]
    assert len(set(trained)) == len(trained)
    outstanding = set(run.prompts.outstanding)
    assert late <= set(trained) | outstanding
    assert late & set(trained)  # with newer weights, in a later step


def test_batches_hold_prompts_in_the_order_they_were_issued(tmp_path):
    roles = FakeRoles([])
    run = make_run(tmp_path, roles, num_steps=3)
    asyncio.run(train(run))
    records = [PromptRecord("", np.array([3], dtype=np.int32), {})] * 10
    stream = PromptStream(records, seed=0, rollouts_per_prompt=1)
    expected = [stream.next().sample_id.prompt for _ in range(12)]
    assert [i for table in roles.tables for i in table["prompt_index"].to_pylist()] == expected


def test_every_sample_is_journalled_once_or_void_with_its_reason(tmp_path):
    roles = FakeRoles([], fail_prompts=frozenset({2, 5}))
    run = make_run(tmp_path, roles, num_steps=4)
    asyncio.run(train(run))
    written = list(run.journal.since(0))
    trained = [
        f"{epoch}/{prompt}/{replica}"
        for step in written
        for epoch, prompt, replica in zip(*(step.table[c].to_pylist() for c in ("epoch", "prompt_index", "replica")))
    ]
    voids = dict(void for step in written for void in step.voids)
    assert len(trained) == len(set(trained)) == 16
    assert set(voids.values()) == {"told to fail"}
    assert {sample_id.split("/")[1] for sample_id in voids} == {"2", "5"}
    assert not set(trained) & set(voids)
    # Every issued id is in the journal, void, or still outstanding.
    state = written[-1].prompts
    outstanding = sum(end - first for first, end in state["outstanding"])
    assert state["issued"] == len(trained) + len(voids) + outstanding


def test_a_reward_that_always_fails_stops_the_run_with_its_reason(tmp_path):
    roles = FakeRoles([], fail_prompts=frozenset(range(10)))
    with pytest.raises(UserError, match=r"max_void_share.*told to fail"):
        asyncio.run(asyncio.wait_for(train(make_run(tmp_path, roles)), 10))
    assert roles.tables == []


def test_a_failing_role_ends_the_run_with_its_own_error(tmp_path):
    roles = FakeRoles([])

    async def broken(rollout):
        raise OSError("reference is gone")

    roles.logprobs = broken
    with pytest.raises(OSError, match="reference is gone"):
        asyncio.run(asyncio.wait_for(train(make_run(tmp_path, roles)), 10))


class NotFinite(FakeRoles):
    """The generator's log-probabilities of prompt 2 hold a NaN, the reference's of prompt 5 an infinity."""

    async def write(self, prompt: Prompt) -> Rollout:
        rollout = await super().write(prompt)
        if prompt.sample_id.prompt == 2:
            rollout.rollout_logprobs[-1] = math.nan
        return rollout

    async def measure(self, rollout: Rollout) -> np.ndarray:
        logprobs = rollout.rollout_logprobs.copy()
        if rollout.prompt.sample_id.prompt == 5:
            logprobs[0] = -math.inf
        return logprobs


def test_rollouts_with_logprobs_that_are_not_finite_are_void_and_counted(tmp_path):
    roles = NotFinite([])
    run = make_run(tmp_path, roles, num_steps=5)
    asyncio.run(train(run))
    voids = [
        [SampleId.parse(sample_id).prompt, reason] for step in run.journal.since(0) for sample_id, reason in step.voids
    ]
    assert dict(voids) == {
        2: "the generator gave a log-probability that is not finite",
        5: "the reference gave a log-probability that is not finite",
    }
    counts = [record["rollout/voids"] for record in read_records(tmp_path / "metrics.jsonl")]
    assert counts == [len(step.voids) for step in run.journal.since(0)]
    assert (
        sum(counts) == len(voids) >= 4
    )  # an epoch trains on 8 of its 10 prompts: 20 rollouts are two whole epochs and more
    for table in roles.tables:
        assert table.num_rows == 4  # another was written in place of each
        assert not {2, 5} & set(table["prompt_index"].to_pylist())


def test_a_rollout_lost_before_scoring_is_written_again_under_its_id(tmp_path):
    class LosesSome(FakeRoles):
        lost: ClassVar[list[SampleId]] = []

        async def score(self, ref: RolloutRef) -> Score | Void:
            if ref.sample_id.prompt in (2, 5) and ref.sample_id not in self.lost:
                self.lost.append(ref.sample_id)
                raise RolloutLostError("its node is gone")
            return await super().score(ref)

    roles = LosesSome([])
    run = make_run(tmp_path, roles, num_steps=2)
    asyncio.run(train(run))
    rows = [row for table in roles.tables for row in zip(table["epoch"].to_pylist(), table["prompt_index"].to_pylist())]
    assert len(set(rows)) == len(rows) == 8
    assert roles.lost
    assert {(i.epoch, i.prompt) for i in roles.lost} <= set(rows)
    assert not any(step.voids for step in run.journal.since(0))
    assert sum(event.startswith("generate") for event in roles.events) == 8 + len(roles.lost)


def test_a_prompt_that_kills_its_generators_is_void_with_that_reason(tmp_path):
    class Deadly(FakeRoles):
        async def generate(self, prompt: Prompt, *, plain_tokens: int = 0) -> RolloutRef:
            if prompt.sample_id.prompt == 2 and prompt.sample_id.epoch == 0:
                raise GivenUpError("3 Generator replicas died over it", kind="raised")
            return await super().generate(prompt, plain_tokens=plain_tokens)

    roles = Deadly([])
    run = make_run(tmp_path, roles, num_steps=3)
    asyncio.run(train(run))
    voids = [void for step in run.journal.since(0) for void in step.voids]
    assert voids == [("0/2/0", "3 Generator replicas died over it")]
    assert [kind for step in run.journal.since(0) for kind in step.void_kinds] == ["raised"]


@pytest.mark.parametrize(
    ("unscored", "voids", "passed", "interval", "score"),
    [
        # Wilson at z = 1.96, n = 2. One of two: (1/2 +- 1.18431 / 2.9208), where
        # 1.18431 = 1.96 * sqrt(0.25 / 2 + 1.96^2 / 16) and 2.9208 = 1 + 1.96^2 / 2. None: 2 * 0.9604 / 2.9208 at most.
        ({0}, 1, 0.5, (0.0945, 0.9055), 1.0),
        ({0, 1}, 2, 0.0, (0.0, 0.6576), 0.0),
    ],
)
def test_answers_that_cannot_be_scored_count_as_void_and_failed(tmp_path, unscored, voids, passed, interval, score):
    roles = FakeRoles([], fail_prompts=frozenset(unscored))
    run = make_run(tmp_path, roles, num_steps=1, reward={"max_void_share": 1.0})
    for evaluation in asyncio.run(train(run)):
        assert evaluation.void_reason == "told to fail"
        assert (evaluation.prompts, evaluation.voids, evaluation.pass_at_1) == (2, voids, passed)
        assert evaluation.interval == pytest.approx(interval, abs=1e-4)
        assert evaluation.score == score  # the mean over what was scored
        assert evaluation.components == ({"a_words": 1.0, "gold": 0.5} if score else {})
    assert [record["voids"] for record in read_records(tmp_path / "evaluations.jsonl")] == [voids, voids]


def test_an_evaluation_without_enough_scores_stops_the_run_with_the_reason(tmp_path):
    run = make_run(tmp_path, FakeRoles([], fail_prompts=frozenset({0, 1})), num_steps=1)
    with pytest.raises(UserError, match=r"2 of 2 held-out answers .* \(50%\); most often: told to fail"):
        asyncio.run(train(run))
    assert read_records(tmp_path / "evaluations.jsonl") == []


def test_evaluation_happens_before_after_and_every_so_many_steps(tmp_path):
    roles = FakeRoles([])
    run = make_run(tmp_path, roles, num_steps=5, evaluation={"every": 2})
    told: list[tuple[Evaluation, list[Answer], list[Event]]] = []
    run.on_evaluation = lambda *all_three: told.append(all_three)
    answered: list[tuple[int, int]] = []
    run.on_answer = lambda *count: answered.append(count)
    evaluations = asyncio.run(train(run))
    assert [evaluation.policy_version for evaluation in evaluations] == [0, 2, 4, 5]
    assert all(evaluation.pass_at_1 == 1.0 and evaluation.prompts == 2 for evaluation in evaluations)
    assert [evaluation for evaluation, _, _ in told] == evaluations
    assert answered == [(0, 2), (1, 2), (2, 2)] * 4
    for evaluation, answers, _ in told:
        assert [rollout.prompt.sample_id for rollout, _ in answers] == [SampleId(-1, 0, 0), SampleId(-1, 1, 0)]
        assert all(set(rollout.policy_versions) == {evaluation.policy_version} for rollout, _ in answers)


def test_judges_are_heard_in_evaluations_only(tmp_path):
    roles = FakeRoles([])
    evaluations = asyncio.run(train(make_run(tmp_path, roles, num_steps=2)))
    assert [evaluation.components for evaluation in evaluations] == [{"a_words": 1.0, "gold": 0.5}] * 2
    assert {key for table in roles.tables for row in table["components"].to_pylist() for key, _ in row} == {"a_words"}
    assert not any("gold" in key for record in read_records(tmp_path / "metrics.jsonl") for key in record)


def test_a_resumed_run_keeps_its_evaluations_and_repeats_none(tmp_path):
    first = asyncio.run(train(make_run(tmp_path, FakeRoles([]), num_steps=2)))
    told: list[Evaluation] = []
    run = make_run(tmp_path, FakeRoles([]), num_steps=4)
    run.on_evaluation = lambda evaluation, answers, events: told.append(evaluation)
    evaluations = asyncio.run(train(run))
    assert [evaluation.policy_version for evaluation in evaluations] == [0, 2, 4]
    assert evaluations[:2] == first
    assert told == evaluations[2:]


class Asked(FakeRoles):
    """Remembers when the reference was asked, and of whom; it answers -7."""

    def __init__(self) -> None:
        super().__init__([])
        self.asked: list[tuple[int, int]] = []

    async def measure(self, rollout: Rollout) -> np.ndarray:
        self.asked.append((self.step, rollout.prompt.sample_id.epoch))
        return np.full_like(rollout.rollout_logprobs, -7.0)


def test_the_reference_is_not_asked_while_the_policy_equals_it(tmp_path):
    roles = Asked()
    evaluations = asyncio.run(train(make_run(tmp_path, roles, num_steps=3)))
    training = [step for step, epoch in roles.asked if epoch >= 0]
    assert training == [1] * 4 + [2] * 4
    assert [step for step, epoch in roles.asked if epoch < 0] == [3] * 2  # held out, after training
    found = [table["ref_logprobs"].to_pylist() for table in roles.tables]
    assert found == [[None] * 4, [[-7.0, -7.0]] * 4, [[-7.0, -7.0]] * 4]
    # Nulls are what the journal gives back, too.
    assert next(make_run(tmp_path, roles).journal.since(0)).table.equals(roles.tables[0])
    # rollout_logprobs are -4 for each of two tokens.
    assert [evaluation.kl_per_response for evaluation in evaluations] == [0.0, 6.0]


def test_the_journal_has_the_text_of_every_response_and_its_step(tmp_path):
    run = make_run(tmp_path, FakeRoles([]), num_steps=2)
    run.decode = lambda responses: [f"{len(ids)} tokens, first {ids[0]}" for ids in responses]
    asyncio.run(train(run))
    for step, written in enumerate(run.journal.since(0)):
        rows = written.table.to_pylist()
        assert [row["step"] for row in rows] == [step] * 4
        assert [row["response"] for row in rows] == [f"2 tokens, first {row['response_ids'][0]}" for row in rows]


def test_a_run_says_at_every_moment_what_it_is_doing(tmp_path):
    said: list[str] = []
    written = itertools.count()

    class Told(FakeRoles):
        written = 0

        async def write(self, prompt: Prompt) -> Rollout:
            rollout = await super().write(prompt)
            if prompt.sample_id.epoch >= 0:  # the next one is written when this one is scored
                scored = f"step 1: {next(written)} of 4 rollouts are generated and scored"
                while run.doing() != scored:
                    await asyncio.sleep(0)
            said.append(run.doing())
            self.written += prompt.sample_id.epoch == 0
            if prompt.sample_id.epoch == 0 and self.written == 4:  # the last one waits until the others are scored
                while (doing := run.doing()) != "step 1: 3 of 4 rollouts are generated and scored":
                    await asyncio.sleep(0)
                said.append(doing)
            return rollout

        async def update(self, table):
            said.append(run.doing())
            return await super().update(table)

        async def load(self, weights, version):
            said.append(run.doing())
            return await super().load(weights, version)

        async def save(self, directory):
            said.append(run.doing())
            return await super().save(directory)

        async def save_policy(self, directory):
            said.append(run.doing())
            await super().save_policy(directory)

    run = make_run(tmp_path, Told([]), num_steps=1)
    asyncio.run(asyncio.wait_for(train(run), 60))
    assert set(said) >= {
        "version 0 of the policy has answered 0 of 2 held-out prompts",
        "step 1: 0 of 4 rollouts are generated and scored",
        "step 1: 3 of 4 rollouts are generated and scored",
        "step 1: the learner learns",
        "step 1: generators take the new weights",
        "step 1: a checkpoint is written",
        "version 1 of the policy has answered 0 of 2 held-out prompts",
        "the policy is written",
    }
    again = make_run(tmp_path, Told([]), num_steps=1)
    shutil.rmtree(tmp_path / "checkpoints")
    run = again
    asyncio.run(train(again))
    assert "step 1 is learned again from the journal" in said


@pytest.mark.parametrize("on_signal", [True, False])
def test_a_run_told_to_stop_ends_its_step_and_saves_it_only_where_wanted(tmp_path, on_signal):
    events: list[str] = []
    roles = FakeRoles(events)
    run = make_run(tmp_path, roles, num_steps=5, checkpoint={"every": 100, "on_signal": on_signal})

    async def stopped_while_learning() -> None:
        training = asyncio.create_task(train(run))
        while not (roles.step == 2 and roles.updating):
            await asyncio.sleep(0.0005)
        training.cancel()
        with pytest.raises(asyncio.CancelledError):
            await training

    asyncio.run(asyncio.wait_for(stopped_while_learning(), 60))
    logged = [record["step"] for record in read_records(tmp_path / "metrics.jsonl")]
    if on_signal:
        assert logged == [0, 1, 2]
        assert events[-1] == "save 3"
        assert run.checkpoints.newest() == run.checkpoints.path(3)
    else:
        assert logged == [0, 1]
        assert not [event for event in events if event.startswith("save")]
    assert run.journal.next_step == 3  # the third batch is on disk either way: nothing is lost


def test_a_run_told_to_stop_while_steps_are_learned_again_saves_no_older_step(tmp_path):
    class LosesARank(FakeRoles):
        async def unless_lost(self, work):
            if self.step == 2 and "rebuild" not in self.events:
                raise RankLostError("Learner(0) died")
            return await work

    events: list[str] = []
    roles = LosesARank(events, synchronous=False)
    run = make_run(tmp_path, roles, num_steps=5, checkpoint={"every": 100, "on_signal": True})

    async def stopped_while_learning_again() -> None:
        training = asyncio.create_task(train(run))
        while not ("rebuild" in events and roles.step == 1 and roles.updating):
            await asyncio.sleep(0.0005)
        training.cancel()
        with pytest.raises(asyncio.CancelledError):
            await training

    asyncio.run(asyncio.wait_for(stopped_while_learning_again(), 60))
    assert (roles.step, run.journal.next_step) == (1, 2)
    assert not [event for event in events if event.startswith("save")]
