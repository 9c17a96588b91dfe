"""A resumed run continues where it stopped: from its checkpoint, its journal, or both."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.errors import UserError
from common.files import read_records
from common.types import RolloutRef, Score
from learner.loop.journal import Journal, JournalError
from learner.loop.train_loop import train
from tests.fakes import FakeRoles
from tests.learner.loop.test_train_loop import Asked, make_run


def test_a_run_continues_from_checkpoint_and_journal(tmp_path):
    checkpoint = {"every": 2}
    whole, cut, rest = FakeRoles([]), FakeRoles([]), FakeRoles([])
    asyncio.run(train(make_run(tmp_path / "whole", whole, num_steps=6, checkpoint=checkpoint)))
    asyncio.run(train(make_run(tmp_path / "cut", cut, num_steps=3, checkpoint=checkpoint)))
    for leftover in (tmp_path / "cut/checkpoints/step-000003").iterdir():
        leftover.unlink()  # as if the process had died before this checkpoint was complete
    asyncio.run(train(make_run(tmp_path / "cut", rest, num_steps=6, checkpoint=checkpoint)))

    assert rest.events[:4] == ["restore 2", "update 2", "publish v3", "load v3"]
    assert rest.tables[0].equals(cut.tables[2])  # step 2 again, from the journal, without generating
    for resumed, uninterrupted in zip(cut.tables + rest.tables[1:], whole.tables, strict=True):
        assert resumed.equals(uninterrupted)
    assert [record["step"] for record in read_records(tmp_path / "cut/metrics.jsonl")] == list(range(6))


class Clipping(FakeRoles):
    """A learner whose clip removes most of the gradient from step 2 on."""

    async def update(self, table: Any) -> dict[str, float]:
        share = 0.9 if self.step >= 2 else 0.1
        return {**await super().update(table), "ppo/clip_frac": share}


@pytest.mark.parametrize("cut", [0, 3, 5])
def test_a_record_names_the_health_rules_that_hold(tmp_path, cut):
    rule = "clip_frac_high"
    told: list[int] = []
    for num_steps in (cut, 7) if cut else (7,):
        run = make_run(tmp_path, Clipping([]), num_steps=num_steps, checkpoint={"every": 2})
        run.on_step = lambda record, example, voids, events: told.extend(
            event.steps for event in events if event.rule == rule
        )
        asyncio.run(train(run))
    # In two of three steps from step 3 on. The run continues as if it had not been cut.
    named = [rule in record.get("health", []) for record in read_records(tmp_path / "metrics.jsonl")]
    assert named == [False, False, False, True, True, True, True]
    assert told == [1, 2, 3, 4]


def test_a_checkpoint_ahead_of_the_journal_is_refused_by_name(tmp_path):
    asyncio.run(train(make_run(tmp_path, FakeRoles([]))))
    for lost in (tmp_path / "journal").glob("step-000002.*"):
        lost.unlink()
    roles = FakeRoles([])
    with pytest.raises(JournalError, match=r"step-000003 holds 3 steps, but the journal only 2"):
        asyncio.run(train(make_run(tmp_path, roles)))
    assert roles.events == []  # nothing restored, trained, published or generated


@pytest.mark.parametrize("left", [0, 40], ids=["lost", "cut-short"])
def test_a_resumed_run_writes_the_metrics_that_a_kill_prevented(tmp_path, left):
    async def score(ref: RolloutRef) -> Score:
        return Score(value := ref.sample_id.prompt / 4, {"a_words": value})

    def run(num_steps: int) -> FakeRoles:
        roles = FakeRoles([])
        roles.score = score
        asyncio.run(train(make_run(tmp_path, roles, num_steps=num_steps, checkpoint={"every": 1})))
        return roles

    run(2)
    metrics, newest = tmp_path / "metrics.jsonl", tmp_path / "checkpoints/step-000002"
    before = read_records(metrics)
    first, second = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(first + second[:left])
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    events = run(3).events

    assert events[:5] == ["restore 1", "update 1", "save 2", "publish v2", "load v2"]
    after = read_records(metrics)
    assert [record["step"] for record in after] == [0, 1, 2]
    untimed = [{key: value for key, value in record.items() if not key.endswith("_s")} for record in before]
    untimed[1]["time"] = make_run(tmp_path, FakeRoles([])).journal.read(1).time
    assert after[:2] == [before[0], untimed[1]]  # all but the seconds, which nobody knows any more
    assert {"rollout/score/mean", "reward/a_words/score", "staleness/max", "ppo/entropy"} <= after[1].keys()
    assert after[1]["rollout/score/mean"] != after[0]["rollout/score/mean"]  # each step's own


def test_a_checkpoint_without_its_journal_is_refused(tmp_path):
    asyncio.run(train(make_run(tmp_path, FakeRoles([]), num_steps=2)))
    shutil.rmtree(tmp_path / "journal")
    with pytest.raises(JournalError, match="step-000002 holds 2 steps, but the journal only 0"):
        asyncio.run(train(make_run(tmp_path, FakeRoles([]), num_steps=4)))


def note(directory: Path, kind: str, **fields: Any) -> None:
    journal = Journal(directory / "journal")
    journal.open_for_writing()
    journal.note(kind, **fields)


def test_steps_are_not_learned_again_from_another_model(tmp_path):
    note(tmp_path, "begin", identity={"model": "first"}, config={}, versions={})
    note(tmp_path, "accept", identity={"model": "second"})  # before the first step: the run begins with it
    asyncio.run(train(make_run(tmp_path, FakeRoles([]), num_steps=2)))
    note(tmp_path, "accept", identity={"model": "third"})
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "kept")
    shutil.rmtree(tmp_path / "checkpoints")
    refused = FakeRoles([])
    with pytest.raises(UserError, match=r"learned again .* other files of the model \(SHA-256 second; --accept"):
        asyncio.run(train(make_run(tmp_path, refused, num_steps=3)))
    assert refused.events == []
    shutil.copytree(tmp_path / "kept", tmp_path / "checkpoints")
    roles = FakeRoles([])
    asyncio.run(train(make_run(tmp_path, roles, num_steps=3)))  # the checkpoint has the weights
    assert roles.events[0] == "restore 2"
    shutil.rmtree(tmp_path / "checkpoints")
    note(tmp_path, "accept", identity={"model": "second"})
    roles = FakeRoles([])
    asyncio.run(train(make_run(tmp_path, roles, num_steps=4)))
    assert [event for event in roles.events if event.startswith("update")] == [f"update {n}" for n in range(4)]


def test_a_resumed_run_asks_the_reference_from_its_first_new_step(tmp_path):
    asyncio.run(train(make_run(tmp_path, Asked(), num_steps=1)))
    roles = Asked()
    asyncio.run(train(make_run(tmp_path, roles, num_steps=2)))
    assert [step for step, epoch in roles.asked if epoch >= 0] == [1] * 4
    assert roles.tables[-1]["ref_logprobs"].null_count == 0


def test_a_replayed_record_has_the_time_at_which_its_batch_was_cut(tmp_path, monkeypatch):
    asyncio.run(train(make_run(tmp_path, FakeRoles([]), num_steps=1)))
    [first], [before, after] = (read_records(tmp_path / name) for name in ("metrics.jsonl", "evaluations.jsonl"))
    [written] = make_run(tmp_path, FakeRoles([])).journal.since(0)
    assert before["time"] <= written.time <= first["time"] <= after["time"]
    (tmp_path / "metrics.jsonl").unlink()  # a crash before the record was written, and before the checkpoint
    shutil.rmtree(tmp_path / "checkpoints")
    asyncio.run(train(make_run(tmp_path, FakeRoles([]), num_steps=2)))
    again, second = read_records(tmp_path / "metrics.jsonl")
    assert again["time"] == written.time < second["time"]
