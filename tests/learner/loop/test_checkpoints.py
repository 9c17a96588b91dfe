"""Checkpoints as the driver sees them: counted as numbers, checked before they are used, set aside if they are not."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from common.experience_table import experience_table
from common.files import sha256
from learner.loop.chain import JournalError
from learner.loop.checkpoints import COMPLETE, CheckpointError, Checkpoints, restore_newest, save_now
from learner.loop.journal import Journal
from tests.fakes import make_experience


def make_journal(directory: Path, steps: int) -> Journal:
    journal = Journal(directory)
    journal.open_for_writing()
    journal.note("begin", identity={"model": "m0", "prompts.train": "p0"}, config={}, versions={})
    for step in range(steps):
        table = experience_table([make_experience(step, [4, 5])], step=step)
        journal.append(table, policy_version=step, prompts={})
    return journal


class Files:
    """Stands in for the learner: its checkpoint is two small files."""

    def __init__(self, step: int = 0) -> None:
        self.step = step

    async def save(self, directory: Path) -> dict[str, str]:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        for name in ("weights-00000.safetensors", "optimizer-00000.safetensors"):
            (directory / name).write_bytes(f"{name} of step {self.step}".encode())
        return {path.name: sha256(path) for path in directory.iterdir()}

    async def restore(self, directory: Path) -> None:
        self.step = int((directory / "weights-00000.safetensors").read_text().split()[-1])


def make(run: Path, steps: list[int], *, journal: Journal | None = None, keep: int = 100) -> Checkpoints:
    checkpoints = Checkpoints(run / "checkpoints", every=1, keep=keep, journal=journal)
    for step in steps:
        asyncio.run(save_now(Files(step), checkpoints))
    return checkpoints


def change_marker(checkpoints: Checkpoints, of: int, **fields: object) -> None:
    marker = checkpoints.path(of) / COMPLETE
    marker.write_text(json.dumps(json.loads(marker.read_text()) | fields))


def restore(checkpoints: Checkpoints, num_steps: int = 1000) -> tuple[int | None, list[str]]:
    """The step that was restored, and what was reported."""
    reports: list[str] = []
    learner = Files()
    found = asyncio.run(restore_newest(learner, checkpoints, num_steps=num_steps, report=reports.append))
    return learner.step if found else None, reports


def test_steps_are_compared_as_numbers(tmp_path):
    checkpoints = make(tmp_path, [999998, 999999, 1000000], keep=2)
    assert checkpoints.steps() == [999999, 1000000]
    assert checkpoints.newest() == tmp_path / "checkpoints/step-1000000"


def test_foreign_names_and_links_are_neither_used_nor_followed_nor_removed(tmp_path):
    checkpoints = make(tmp_path, [1, 2, 3], keep=2)
    directory, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in (COMPLETE, "precious"):
        (elsewhere / name).touch()
    for name in ("step-000003-backup", "step-0000004", "notes", "step-x"):
        (directory / name).mkdir()
        (directory / name / COMPLETE).touch()
    (directory / "step-000099").write_text("a plain file")
    (directory / "step-000098").symlink_to(elsewhere)
    before = sorted(path.name for path in directory.iterdir())
    checkpoints.prune()
    assert restore(checkpoints) == (3, [])
    assert sorted(path.name for path in directory.iterdir()) == before
    assert (elsewhere / "precious").exists()


def test_the_marker_says_where_in_the_journal_a_checkpoint_is(tmp_path):
    journal = make_journal(tmp_path / "journal", 3)
    checkpoints = make(tmp_path, [2], journal=journal)
    marker = json.loads((checkpoints.path(2) / COMPLETE).read_text())
    files = {path.name: sha256(path) for path in checkpoints.path(2).iterdir() if path.name != COMPLETE}
    assert marker == {
        "schema": 1,
        "step": 2,
        "journal": sha256(tmp_path / "journal/step-000001.arrow"),
        "voids": [],
        "identity": {"model": "m0", "prompts.train": "p0"},
        "files": files,
    }
    checkpoints.check(2)


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


def test_a_link_in_a_checkpoints_place_is_not_written_through(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / COMPLETE).touch()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/step-000001").symlink_to(elsewhere)
    (tmp_path / "checkpoints/step-000002").write_text("a plain file")
    checkpoints = make(tmp_path, [1, 2])
    assert checkpoints.steps() == [1, 2]
    assert [path.name for path in elsewhere.iterdir()] == [COMPLETE]
    assert (tmp_path / "set-aside/step-000001").is_symlink()
    assert (tmp_path / "set-aside/step-000002").read_text() == "a plain file"


def test_a_removal_cut_short_leaves_nothing_that_counts(tmp_path, monkeypatch):
    checkpoints = make(tmp_path, [1, 2, 3])

    def cut_short(directory: Path, *, ignore_errors: bool) -> None:
        (directory / "optimizer-00000.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("learner.loop.checkpoints.shutil.rmtree", cut_short)
    with pytest.raises(KeyboardInterrupt):
        Checkpoints(tmp_path / "checkpoints", every=1, keep=2).prune()
    assert checkpoints.steps() == [2, 3]


def test_every_flipped_bit_of_every_file_is_found(tmp_path):
    journal = make_journal(tmp_path / "journal", 2)
    checkpoints = make(tmp_path, [1], journal=journal)
    for path in checkpoints.path(1).iterdir():
        whole, size = path.read_bytes(), 8 * path.stat().st_size
        flips = range(size) if path.name == COMPLETE else np.random.default_rng(0).integers(0, size, 40).tolist()
        for bit in flips:
            flip(path, bit)
            try:
                checkpoints.check(1)
            except CheckpointError:
                pass
            else:  # only the space between words may change
                assert json.loads(path.read_bytes()) == json.loads(whole)
            path.write_bytes(whole)
    checkpoints.check(1)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"step": 1}, "it was written as step 1"),
        ({"journal": "0" * 64}, "does not follow step 1 of this run's journal"),
        ({"voids": [0]}, "has skipped are not those"),
        ({"identity": {"model": "m1", "prompts.train": "p0"}}, "another model"),
        ({"schema": 2}, "has schema 2"),
        ({"files": {"../../x": ""}}, "names files that no checkpoint has"),
        ({"files": {"/etc/passwd": ""}}, "names files that no checkpoint has"),
        ({"files": {"gone": "0"}}, "gone is missing"),
        ({"files": [1]}, "cannot be read"),
        ({"files": {}}, "names files that no checkpoint has"),
    ],
)
def test_a_checkpoint_that_is_not_of_this_place_is_set_aside(tmp_path, fields, reason):
    journal = make_journal(tmp_path / "journal", 3)
    checkpoints = make(tmp_path, [1, 2], journal=journal)
    change_marker(checkpoints, 2, **fields)
    with pytest.raises(CheckpointError, match=reason):
        checkpoints.check(2)
    step, [report] = restore(checkpoints)
    assert step == 1
    assert reason in report
    assert not checkpoints.path(2).exists()
    assert (tmp_path / "set-aside/step-000002/weights-00000.safetensors").exists()
    [line] = (tmp_path / "set-aside/README.txt").read_text().splitlines()[2:]
    assert "checkpoints/step-000002 -> step-000002: " in line
    assert reason in line


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "a link", "no marker", "marker cut"])
def test_damage_costs_one_checkpoint_and_nothing_else(tmp_path, damage):
    checkpoints = make(tmp_path, [1, 2, 3])
    weights, marker = checkpoints.path(3) / "weights-00000.safetensors", checkpoints.path(3) / COMPLETE
    if damage in ("cut", "marker cut"):
        path = weights if damage == "cut" else marker
        path.write_bytes(path.read_bytes()[:-3])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "a link":
        weights.rename(tmp_path / "moved")
        weights.symlink_to(tmp_path / "moved")
    else:
        (weights if damage == "gone" else marker).unlink()
    step, reports = restore(checkpoints)
    assert step == 2
    assert len(reports) == (damage != "no marker")  # without it, a crash may have cut the write short


def test_with_no_sound_checkpoint_nothing_is_restored(tmp_path):
    checkpoints = make(tmp_path, [1, 2])
    for step in (1, 2):
        (checkpoints.path(step) / "weights-00000.safetensors").write_bytes(b"")
    step, reports = restore(checkpoints)
    assert step is None
    assert len(reports) == 2
    assert {path.name for path in (tmp_path / "set-aside").iterdir()} == {"README.txt", "step-000001", "step-000002"}


def test_a_second_one_of_a_name_is_set_aside_under_another(tmp_path):
    for _ in range(2):
        checkpoints = make(tmp_path, [1])
        (checkpoints.path(1) / "weights-00000.safetensors").write_bytes(b"")
        restore(checkpoints)
    assert {path.name for path in (tmp_path / "set-aside").iterdir()} == {"README.txt", "step-000001", "step-000001-2"}


def test_a_checkpoint_that_skipped_another_batch_is_not_used(tmp_path):
    journal = make_journal(tmp_path / "journal", 3)
    checkpoints = make(tmp_path, [1, 2, 3], journal=journal)
    journal.void(1, "it was the batch after all")
    for step in (2, 3):
        with pytest.raises(CheckpointError, match="has skipped are not those"):
            checkpoints.check(step)
    checkpoints.check(1)
    [again] = make(tmp_path / "again", [3], journal=journal).steps()
    Checkpoints(tmp_path / "again/checkpoints", every=1, keep=1, journal=journal).check(again)


def test_what_was_accepted_later_does_not_make_an_older_checkpoint_wrong(tmp_path):
    journal = make_journal(tmp_path / "journal", 2)
    checkpoints = make(tmp_path, [2], journal=journal)
    journal.note("accept", identity={"prompts.train": "p1"})
    checkpoints.check(2)
    journal.append(experience_table([make_experience(9, [4])], step=2), policy_version=2, prompts={})
    asyncio.run(save_now(Files(3), checkpoints))
    assert json.loads((checkpoints.path(3) / COMPLETE).read_text())["identity"]["prompts.train"] == "p1"
    checkpoints.check(2)
    checkpoints.check(3)


def test_a_sound_checkpoint_ahead_of_the_journal_says_that_steps_were_lost(tmp_path):
    checkpoints = make(tmp_path, [3], journal=make_journal(tmp_path / "journal", 3))
    for path in (tmp_path / "journal").glob("step-000002.*"):
        path.unlink()
    behind = Checkpoints(tmp_path / "checkpoints", every=1, keep=1, journal=Journal(tmp_path / "journal"))
    with pytest.raises(JournalError, match="step-000003 holds 3 steps, but the journal only 2"):
        restore(behind)
    assert checkpoints.steps() == [3]


def test_a_checkpoint_that_does_not_fit_the_network_ends_the_run(tmp_path):
    class Other(Files):
        async def restore(self, directory: Path) -> None:
            raise UserError(f"checkpoint {directory} cannot be read (no value_head)")

    checkpoints = make(tmp_path, [1, 2])
    with pytest.raises(UserError, match=r"step-000002 was set aside .*no value_head.* continue with --resume"):
        asyncio.run(restore_newest(Other(), checkpoints, num_steps=9, report=print))
    assert checkpoints.steps() == [1]


def test_the_best_checkpoint_stays(tmp_path):
    checkpoints = make(tmp_path, [1, 2])
    checkpoints.best = 1
    for step in (3, 4):
        asyncio.run(save_now(Files(step), checkpoints))
    Checkpoints(tmp_path / "checkpoints", every=1, keep=2).steps()
    kept = Checkpoints(tmp_path / "checkpoints", every=1, keep=2)
    kept.best = 1
    kept.prune()
    assert kept.steps() == [1, 3, 4]


def test_a_checkpoint_without_optimizer_is_sound_but_cannot_continue(tmp_path):
    checkpoints = make(tmp_path, [1, 2])
    checkpoints.drop_optimizers()
    for step in (1, 2):
        assert {path.name for path in checkpoints.path(step).iterdir()} == {"weights-00000.safetensors", COMPLETE}
        checkpoints.check(step)
        assert not checkpoints.can_continue(step)
    assert restore(checkpoints, num_steps=3) == (None, [])
    assert restore(checkpoints, num_steps=2) == (2, [])
    checkpoints.drop_optimizers()
    assert checkpoints.steps() == [1, 2]


def test_a_reason_cannot_control_a_terminal(tmp_path):
    checkpoints = make(tmp_path, [1])
    change_marker(checkpoints, 1, step="\x1b[2J")
    restore(checkpoints)
    readme = (tmp_path / "set-aside/README.txt").read_text()
    assert "it was written as step \\x1b[2J" in readme
    assert "\x1b" not in readme


def test_checkpoints_that_training_can_continue_from_stay_beside_newer_ones_that_it_cannot(tmp_path):
    """A run that ended is continued: it learns its steps again, and must not lose the checkpoints that it writes."""
    checkpoints = make(tmp_path, [8, 9], keep=2)
    checkpoints.drop_optimizers()
    for step in (2, 4, 6):
        asyncio.run(save_now(Files(step), checkpoints))
    assert checkpoints.steps() == [4, 6, 8, 9]
    assert restore(checkpoints) == (6, [])
    asyncio.run(save_now(Files(9), checkpoints))  # replaces one without an optimizer
    assert restore(checkpoints) == (9, [])
    asyncio.run(save_now(Files(10), checkpoints))
    assert checkpoints.steps() == [9, 10]


def test_a_checkpoint_that_cannot_be_removed_does_not_end_the_run(tmp_path, monkeypatch):
    def busy(path, *arguments, **options):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    checkpoints = make(tmp_path, [1, 2], keep=1)
    monkeypatch.setattr(os, "rmdir", busy)
    asyncio.run(save_now(Files(3), checkpoints))
    assert checkpoints.steps() == [3]
    monkeypatch.undo()
    asyncio.run(save_now(Files(4), checkpoints))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000004"]
