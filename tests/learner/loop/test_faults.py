"""Lost ranks, poison batches, changed settings: the learner's state stays a function of the journal.

`HashLearner` stands in for the learner: its state is a hash of everything that it has learned, in order. `followed`
computes the state that a journal leads to, from the files alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from common.errors import BatchError, BrokenWeightsError, RankLostError, RoleError, UserError
from common.files import read_records, sha256
from learner.loop.journal import Journal
from learner.loop.train_loop import train
from tests.fakes import FakeRoles
from tests.learner.loop.test_train_loop import make_run

Fault = Callable[["HashLearner"], None]


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def content(table: pa.Table) -> Any:
    return table.to_pylist()


FIRST_RATE = 1e-6


def followed(directory: Path, end: int | None = None) -> str:
    """The state after all steps of a journal, or after those before `end`."""
    entries = [json.loads(path.read_text()) for path in sorted(directory.glob("note-*.json"))]
    voided = {entry["step"] for entry in entries if entry["kind"] == "void"}
    changes = [(entry["before_step"], entry["settings"]) for entry in entries if entry["kind"] == "change"]
    rate, state = FIRST_RATE, "new"
    for step, path in enumerate(sorted(directory.glob("step-*.arrow"))[:end]):
        for before_step, changed in changes:
            if before_step == step:
                rate = changed["optimizer.learning_rate"]
        if step not in voided:
            state = digest(state, content(pa.ipc.open_file(path).read_all()), rate)
    return state


class HashLearner(FakeRoles):
    """Faults are {call: [what happens at its first time, at its second time, ...]}."""

    def __init__(self, faults: dict[str, list[Fault | None]] | None = None, poison: Any = None) -> None:
        super().__init__([], synchronous=False)
        self.state = "new"
        self.rate = self.configured_rate = self.newest_rate = FIRST_RATE
        self.alive = True
        self.rates: list[tuple[int, float]] = []
        self._faults = faults or {}
        self._poison = poison or (lambda learner, table: None)

    def _call(self, name: str) -> None:
        if not self.alive:
            raise RankLostError("Learner(0) is gone")
        if fault := (self._faults.get(name) or [None]).pop(0):
            fault(self)

    async def update(self, table: pa.Table) -> dict[str, float]:
        self._call("update")
        if error := self._poison(self, table):
            self.state = "torn"
            raise error
        self.state = digest(self.state, content(table), self.rate)
        self.rates.append((self.step, self.rate))
        return await super().update(table)

    async def skip(self) -> None:
        self._call("skip")
        await super().skip()

    async def reconfigure(self, cfg: Any) -> None:
        """As a real learner treats kl.coef: a new value replaces the state, which checkpoints have too."""
        self._call("reconfigure")
        if cfg.optimizer.learning_rate != self.configured_rate:
            self.rate = self.configured_rate = cfg.optimizer.learning_rate

    async def publish(self):
        self._call("publish")
        async for bucket in super().publish():
            self._call("bucket")
            yield bucket

    async def policy_logprobs(self, rollouts):
        self._call("policy_logprobs")
        return await super().policy_logprobs(rollouts)

    async def save(self, directory: Path) -> dict[str, str]:
        self._call("save")
        directory.mkdir(parents=True)
        (directory / "optimizer-00000").write_text(json.dumps([self.step, self.state, self.rate]))
        self.events.append(f"save {self.step}")
        return {"optimizer-00000": sha256(directory / "optimizer-00000")}

    async def restore(self, directory: Path) -> None:
        self._call("restore")
        self.step, self.state, self.rate = json.loads((directory / "optimizer-00000").read_text())
        self.events.append(f"restore {self.step}")

    async def save_policy(self, directory: Path) -> None:
        self._call("save_policy")
        directory.mkdir(exist_ok=True)
        (directory / "state").write_text(self.state)

    async def rebuild(self) -> None:
        self.alive = True
        self.state, self.rate, self.configured_rate = "new", self.newest_rate, self.newest_rate
        await super().rebuild()
        self._call("rebuild")

    async def unless_lost(self, work: Any) -> Any:
        """A rank dies while something else is waited for, if it is told to."""
        task = asyncio.ensure_future(work)
        for _ in range(3):
            await asyncio.sleep(0)
        try:
            self._call("unless_lost")
        except RankLostError:
            task.cancel()
            raise
        return await task


def dies(learner: HashLearner) -> None:
    learner.alive, learner.state = False, "lost"
    raise RankLostError('Learner(0) died during "update"')


def run_with(directory: Path, role: HashLearner, /, **overrides: Any) -> list[str]:
    """Trains, and returns what was reported."""
    rate = {"optimizer": {"learning_rate": FIRST_RATE}}
    settings: dict[str, Any] = {"num_steps": 6, "checkpoint": {"every": 2}, **rate, **overrides}
    run = make_run(directory, role, **settings)
    role.rate = role.configured_rate = role.newest_rate = run.cfg.optimizer.learning_rate
    reports: list[str] = []
    run.report = reports.append
    asyncio.run(asyncio.wait_for(train(run), 30))
    return reports


def check_whole(directory: Path, learner: HashLearner, steps: int = 6) -> None:
    """Every step is on disk, logged once, and the learner is where the journal leads."""
    assert Journal(directory / "journal").next_step == steps
    assert [record["step"] for record in read_records(directory / "metrics.jsonl")] == list(range(steps))
    assert learner.state == followed(directory / "journal") == (directory / "policy/state").read_text()


SHARES = {"generators": {"gpus": 0.6}, "learner": {"gpus": 0.4}}
CALLS = ["unless_lost", "update", "publish", "bucket", "save", "policy_logprobs", "save_policy"]


@pytest.mark.parametrize("call", CALLS)
def test_engines_that_sleep_wake_again_after_a_rank_died(tmp_path, call):
    learner = HashLearner({call: [None] * (call != "save_policy") + [dies]})
    run_with(tmp_path, learner, max_staleness=0, **SHARES)
    check_whole(tmp_path, learner)
    updates = [before for before, event in pairwise(learner.events) if event.startswith("update")]
    assert set(updates) == {"sleep"}
    assert not learner.asleep


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("call", CALLS)
def test_a_rank_that_dies_costs_nothing_but_time(tmp_path, call, number, staleness):
    learner = HashLearner({call: [None] * number + [dies]})
    reports = run_with(tmp_path, learner, max_staleness=staleness)
    happened = number < {"save": 3, "policy_logprobs": 1, "save_policy": 1}.get(call, 9)
    assert learner.events.count("rebuild") == happened
    assert len(reports) == happened
    check_whole(tmp_path, learner)
    table = pa.concat_tables(step.table for step in Journal(tmp_path / "journal").since(0))
    ids = list(zip(table["epoch"].to_pylist(), table["prompt_index"].to_pylist(), strict=True))
    assert len(ids) == len(set(ids)) == 24
    generated = sum(event.startswith("generate") for event in learner.events)
    assert generated == 24  # generators continued: nothing was written twice


def test_with_max_losses_1_the_first_loss_ends_the_run(tmp_path):
    with pytest.raises(RoleError, match="lost ranks 1 times without finishing"):
        run_with(tmp_path, HashLearner({"update": [dies]}), learner={"max_losses": 1})


@pytest.mark.parametrize("call", ["rebuild", "restore"])
def test_a_rank_that_dies_during_the_recovery_is_replaced_too(tmp_path, call):
    learner = HashLearner({"update": [None] * 3 + [dies], call: [dies]})
    run_with(tmp_path, learner)
    assert learner.events.count("rebuild") == 2
    check_whole(tmp_path, learner)


def test_ranks_lost_again_and_again_end_the_run_with_the_cause(tmp_path):
    learner = HashLearner({"update": [None, *[dies] * 9]})
    with pytest.raises(RoleError, match=r"lost ranks 3 times without .* \(step 1\); .* Learner\(0\) died .*--resume"):
        run_with(tmp_path, learner)
    resumed = HashLearner()
    run_with(tmp_path, resumed)
    check_whole(tmp_path, resumed)


def test_a_publication_that_always_kills_a_rank_ends_the_run(tmp_path):
    """Each recovery learns steps again, but no new one."""
    with pytest.raises(RoleError, match="lost ranks 3 times without finishing"):
        run_with(tmp_path, HashLearner({"publish": [None] * 4 + [dies] * 9}))


def test_losses_that_are_far_apart_do_not_add_up(tmp_path):
    faults = [fault for _ in range(6) for fault in (dies, None)]
    learner = HashLearner({"update": faults}, poison=None)
    run_with(tmp_path, learner, checkpoint={"every": 1})
    assert learner.events.count("rebuild") == 6
    check_whole(tmp_path, learner)


# Batches that cannot be learned from


def poisoned(*steps: int, error: type[BatchError] = BatchError) -> Callable[..., Any]:
    def found(learner: HashLearner, table: pa.Table) -> BatchError | None:
        return error("the loss is not finite (nan)") if table["step"][0].as_py() in steps else None

    return found


@pytest.mark.parametrize("step", range(6))
def test_a_poison_batch_is_void_with_its_reason_and_the_run_continues(tmp_path, step):
    learner = HashLearner(poison=poisoned(step))
    [report] = run_with(tmp_path, learner)
    assert report == f"nothing is learned from the batch of step {step + 1}: the loss is not finite (nan)"
    journal = Journal(tmp_path / "journal")
    [note] = journal.notes
    assert (note.kind, note.before_step) == ("void", step + 1)
    assert note.fields == {
        "step": step,
        "reason": "the loss is not finite (nan)",
        "sample_ids": journal.read(step).sample_ids,
    }
    assert len(note.fields["sample_ids"]) == 4
    check_whole(tmp_path, learner)
    assert f"skip {step}" in learner.events
    assert f"load v{step + 1}" in learner.events  # its version is published, with the weights of the one before
    record = read_records(tmp_path / "metrics.jsonl")[step]
    assert "ppo/entropy" not in record
    assert record["ppo/optimizer_steps"] == 0
    assert record["rollout/score/mean"] == 1.0
    shutil.rmtree(tmp_path / "checkpoints")
    again = HashLearner(poison=poisoned(step))  # replay honours the note, so it is not asked to learn the batch
    run_with(tmp_path, again, num_steps=6)
    assert again.state == learner.state


def test_a_learner_that_failed_half_way_is_restored_or_replaced(tmp_path):
    learner = HashLearner(poison=poisoned(1, 4))
    run_with(tmp_path, learner)
    first, second = learner.events.index("skip 1"), learner.events.index("skip 4")
    assert learner.events[:first].count("rebuild") == 1  # there was no checkpoint yet
    assert learner.events[first:second][-2:].count("restore 4") + learner.events[:second].count("restore 4") >= 1
    check_whole(tmp_path, learner)


def test_three_voids_in_a_row_end_the_run_and_name_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"3 batches in a row \(step 3: the loss .*; step 4: .*; step 5: .*--change"):
        run_with(tmp_path, HashLearner(poison=poisoned(2, 3, 4)))
    journal = Journal(tmp_path / "journal")
    assert sorted(journal.voided) == [2, 3, 4]
    resumed = HashLearner()
    run_with(tmp_path, resumed)
    check_whole(tmp_path, resumed)


def test_a_batch_that_fails_only_in_a_replay_is_void_from_then_on(tmp_path):
    """As on another machine. The steps after it are learned again without it, and no old checkpoint is used."""
    run_with(tmp_path, HashLearner(), num_steps=4)
    (tmp_path / "checkpoints/step-000004/optimizer-00000").write_text("[]")
    learner = HashLearner(poison=poisoned(2))
    reports = run_with(tmp_path, learner, num_steps=6)
    assert [report.partition(":")[0] for report in reports[1:]] == ["nothing is learned from the batch of step 3"]
    assert sorted(Journal(tmp_path / "journal").voided) == [2]
    assert [event for event in learner.events if event.startswith("restore")] == ["restore 2"] * 2
    check_whole(tmp_path, learner)


def test_voids_that_are_apart_do_not_end_the_run(tmp_path):
    learner = HashLearner(poison=poisoned(0, 1, 3, 4))
    run_with(tmp_path, learner)
    check_whole(tmp_path, learner)


def test_after_a_change_of_settings_voids_are_counted_again(tmp_path):
    with pytest.raises(UserError, match="3 batches in a row"):
        run_with(tmp_path, HashLearner(poison=poisoned(1, 2, 3)))
    change(tmp_path, 1e-4)
    learner = HashLearner(poison=poisoned(1, 2, 3, 4, 5))
    run_with(tmp_path, learner, num_steps=6, optimizer={"learning_rate": 1e-4})
    assert sorted(Journal(tmp_path / "journal").voided) == [1, 2, 3, 4, 5]


def test_weights_that_are_broken_void_the_batch_before(tmp_path):
    """The policy gives NaN before step 3 is learned: step 2 broke it."""

    def broken(learner: HashLearner, table: pa.Table) -> BatchError | None:
        after_2 = followed(tmp_path / "journal", 3)
        return BrokenWeightsError("a log-probability is not finite (nan)") if learner.state == after_2 else None

    learner = HashLearner(poison=broken)
    journal = tmp_path / "journal"

    def at_step_3(learner: HashLearner, table: pa.Table) -> BatchError | None:
        voided = Journal(journal).voided
        return broken(learner, table) if table["step"][0].as_py() == 3 and 2 not in voided else None

    learner._poison = at_step_3
    [report] = run_with(tmp_path, learner)
    assert report.startswith("nothing is learned from the batch of step 3: a log-probability")
    assert Journal(journal).voided == {2: "a log-probability is not finite (nan), at step 4"}
    check_whole(tmp_path, learner)


def test_a_model_that_is_broken_from_the_start_is_the_users_error(tmp_path):
    with pytest.raises(UserError, match=r"the first step cannot be trained: the loss .*another model.path"):
        run_with(tmp_path, HashLearner(poison=poisoned(0, error=BrokenWeightsError)))


# Settings that change


def change(directory: Path, rate: float) -> None:
    journal = Journal(directory / "journal")
    journal.open_for_writing()
    journal.note("change", settings={"optimizer.learning_rate": rate})


def begin(directory: Path) -> None:
    journal = Journal(directory / "journal")
    journal.open_for_writing()
    journal.note("begin", identity={}, config={"optimizer": {"learning_rate": FIRST_RATE}}, versions={})


@pytest.mark.parametrize("kept", ["checkpoints", "nothing"])
def test_a_replay_learns_each_step_with_the_settings_of_its_time(tmp_path, kept):
    begin(tmp_path)
    run_with(tmp_path, HashLearner(), num_steps=3)
    change(tmp_path, 1e-3)
    run_with(tmp_path, HashLearner(), num_steps=5, optimizer={"learning_rate": 1e-3})
    change(tmp_path, 1e-2)
    if kept == "nothing":
        shutil.rmtree(tmp_path / "checkpoints")
    learner = HashLearner()
    run_with(tmp_path, learner, num_steps=6, optimizer={"learning_rate": 1e-2})
    rates = [(0, 1e-6), (1, 1e-6), (2, 1e-6), (3, 1e-3), (4, 1e-3), (5, 1e-2)]
    assert learner.rates == (rates if kept == "nothing" else rates[5:])
    check_whole(tmp_path, learner)


@pytest.mark.parametrize("number", range(6))
def test_ranks_lost_after_a_change_use_the_settings_of_each_step(tmp_path, number):
    begin(tmp_path)
    run_with(tmp_path, HashLearner(), num_steps=3, checkpoint={"every": 100, "keep": 1})
    shutil.rmtree(tmp_path / "checkpoints")
    change(tmp_path, 1e-3)
    learner = HashLearner({"update": [None] * number + [dies]})
    run_with(tmp_path, learner, num_steps=6, optimizer={"learning_rate": 1e-3}, checkpoint={"every": 4})
    assert learner.events.count("rebuild") == 1
    check_whole(tmp_path, learner)


# What a resume finds


def test_a_replay_saves_the_checkpoint_that_a_kill_prevented(tmp_path):
    run_with(tmp_path, HashLearner(), num_steps=4)
    shutil.rmtree(tmp_path / "checkpoints/step-000004")
    learner = HashLearner()
    run_with(tmp_path, learner, num_steps=4)
    assert "save 4" in learner.events
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-000002", "step-000004"}


def test_what_a_crash_left_of_a_checkpoint_is_removed(tmp_path):
    run_with(tmp_path, HashLearner(), num_steps=4)
    (tmp_path / "checkpoints/step-000005").mkdir()
    run_with(tmp_path, HashLearner(), num_steps=4)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-000002", "step-000004"}


def test_a_damaged_checkpoint_costs_only_the_steps_after_an_older_one(tmp_path):
    whole = HashLearner()
    run_with(tmp_path / "whole", whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut/checkpoints/step-000006/optimizer-00000").write_text('[6, "another state", 0]')
    learner = HashLearner()
    [report] = run_with(tmp_path / "cut", learner)
    assert "step-000006 was set aside" in report
    assert learner.events[:3] == ["restore 4", "update 4", "update 5"]
    assert learner.state == whole.state


@pytest.mark.parametrize("broken", [b"\xff", b"{}", b"5", b"[]", b"[" * 100_000, b'{"step": ' + b"1" * 5000 + b"}"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl"])
def test_a_broken_line_never_stops_a_resume(tmp_path, name, broken):
    run_with(tmp_path, HashLearner(), num_steps=2)
    before = read_records(tmp_path / name)
    with open(tmp_path / name, "ab") as file:
        file.write(broken + b"\n")
    [report] = run_with(tmp_path, HashLearner(), num_steps=2)
    assert f"1 line(s) of {tmp_path / name} were set aside" in report
    assert (tmp_path / "set-aside" / name).read_bytes() == broken + b"\n"
    assert read_records(tmp_path / name) == before
    assert len((tmp_path / name).read_bytes().splitlines()) == len(before)


def test_steps_without_a_record_get_one_from_the_journal(tmp_path):
    run_with(tmp_path, HashLearner(), num_steps=4)
    metrics = tmp_path / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(lines[0] + lines[1][:40] + b"\n" + lines[3])
    run_with(tmp_path, HashLearner(), num_steps=4)
    records = read_records(metrics)
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    whole = [json.loads(line) for line in lines]
    assert (records[0], records[3]) == (whole[0], whole[3])
    for step in (1, 2):
        rollouts = {key: value for key, value in whole[step].items() if key.startswith(("rollout/", "reward/"))}
        assert rollouts.items() <= records[step].items()
        assert records[step]["time"] == Journal(tmp_path / "journal").read(step).time


def test_the_evaluations_of_another_run_are_not_taken_for_this_runs(tmp_path):
    for name in ("old", "new"):
        run_with(tmp_path / name, HashLearner(), num_steps=2)
    shutil.copy(tmp_path / "old/evaluations.jsonl", tmp_path / "new/evaluations.jsonl")
    learner = HashLearner()
    reports = run_with(tmp_path / "new", learner, num_steps=2)
    assert any("an evaluation of another journal" in report for report in reports)
    [again] = [record for record in read_records(tmp_path / "new/evaluations.jsonl") if record["policy_version"] == 2]
    assert again["journal"] == sha256(tmp_path / "new/journal/step-000001.arrow")


def test_the_best_policy_is_kept_and_the_optimizer_dropped_if_asked(tmp_path):
    scores = iter([0.1, 0.3, 0.9, 0.4, 0.2, 0.8, 0.7])

    class Scored(HashLearner):
        async def judge(self, ref):
            if ref.sample_id.prompt == 0:
                self.now = next(scores)
            while not hasattr(self, "now"):
                await asyncio.sleep(0)
            found = await super().judge(ref)
            return type(found)(self.now, found.components)

    learner = Scored()
    checkpoint = {"every": 100, "keep": 1, "best": True, "keep_optimizer_at_end": False}
    run_with(tmp_path, learner, num_steps=6, checkpoint=checkpoint, evaluation={"every": 1})
    found = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert found == {"step-000002", "step-000006"}  # scores of versions 0 to 6: the best is that of version 2
    assert [event for event in learner.events if event.startswith("save")] == ["save 1", "save 2", "save 6"]
    assert not list((tmp_path / "checkpoints").glob("*/optimizer-*"))
