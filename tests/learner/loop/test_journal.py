"""The journal: what is written is read back, and nothing that happened to a file goes unnoticed."""

import hashlib
import json
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from common.experience_table import EXPERIENCE_SCHEMA, experience_table
from common.types import Experience, Prompt, Rollout, SampleId, Score, Void
from learner.loop import chain
from learner.loop import journal as journal_module
from learner.loop.chain import JournalError
from learner.loop.journal import Journal
from learner.loop.notes import Note, identity, settings_at


def batch(step, rows=2):
    """Row i has i + 1 prompt tokens and i + 2 response tokens, all numbered after the step."""

    def row(i):
        prompt = Prompt(
            SampleId(0, 10 * step + i, 0), f"What is {step}?", np.full(i + 1, step, np.int32), {"answer": i}
        )
        logprobs = np.full(i + 2, -0.5 * (step + 1), np.float32)
        rollout = Rollout(
            prompt, np.full(i + 2, step, np.int32), logprobs, np.full(i + 2, step, np.int32), "stop", "Generator(0)"
        )
        return Experience(rollout, Score(float(step), {"correct": float(step)}), logprobs - 1)

    return experience_table([row(i) for i in range(rows)])


def opened(directory):
    journal = Journal(directory)
    journal.open_for_writing()
    return journal


def write(directory, steps=3):
    """A journal of steps 0, 1, ...; step s was cut at version s."""
    journal = opened(directory)
    for step in range(steps):
        journal.append(batch(step), policy_version=step, prompts={"issued": step})
    return journal


def path(directory, step):
    return directory / f"step-{step:06d}.arrow"


def change(file, old=b"What", new=b"Whxt"):
    data = file.read_bytes()
    assert old in data
    file.write_bytes(data.replace(old, new, 1))


def metadata(file):
    return json.loads(pa.ipc.open_file(file).schema.metadata[b"ratchet"])


def read_all(directory):
    return [written.step for written in Journal(directory).since(0)]


def test_a_step_reads_back_as_it_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module.time, "time", lambda: 1700000000.5)
    journal = opened(tmp_path)
    voids = [
        Void(SampleId(0, 3, 1), "reward source correct raised ValueError: ü", response="Größe"),
        Void(SampleId(1, 0, 0), "environment game: step raised ValueError", kind="raised"),
    ]
    state = {"issued": 7, "outstanding": ["0/4/0", "1/2/1"]}
    assert journal.append(batch(0), policy_version=0, prompts={"issued": 2, "outstanding": []}) == 0
    assert journal.append(batch(1, rows=5), policy_version=3, prompts=state, voids=voids) == 1
    written = journal.read(1)
    assert (written.step, written.policy_version, written.prompts) == (1, 3, state)
    assert written.voids == (
        ("0/3/1", "reward source correct raised ValueError: ü"),
        ("1/0/0", "environment game: step raised ValueError"),
    )
    assert written.void_kinds == ("", "raised")
    assert written.table.equals(batch(1, rows=5))
    assert written.time == 1700000000.5
    assert Journal(tmp_path).read(1) == written  # as another process reads it
    assert metadata(path(tmp_path, 1))["voids"] == [
        ["0/3/1", "reward source correct raised ValueError: ü", "Größe", ""],
        ["1/0/0", "environment game: step raised ValueError", None, "raised"],
    ]
    assert journal.read(0).voids == ()
    assert journal.next_step == 2


def test_since_yields_steps_in_order_from_the_one_asked_for(tmp_path):
    journal = write(tmp_path, steps=4)
    assert [(w.step, w.policy_version, w.table["prompt_index"].to_pylist()) for w in journal.since(2)] == [
        (2, 2, [20, 21]),
        (3, 3, [30, 31]),
    ]
    assert list(journal.since(4)) == []


def test_a_file_is_readable_with_pyarrow_alone_and_its_metadata_is_json(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module.time, "time", lambda: 1700000000.5)
    write(tmp_path, steps=2)
    with pa.ipc.open_file(path(tmp_path, 1)) as file:
        table = file.read_all()
    assert table.schema == EXPERIENCE_SCHEMA
    assert table["response_ids"].to_pylist() == [[1, 1], [1, 1, 1]]
    assert metadata(path(tmp_path, 1)) == {
        "schema": 9,
        "step": 1,
        "time": 1700000000.5,
        "policy_version": 1,
        "prompts": {"issued": 1},
        "voids": [],
        "previous": hashlib.sha256(path(tmp_path, 0).read_bytes()).hexdigest(),
    }
    assert metadata(path(tmp_path, 0))["previous"] == ""


def test_a_table_in_several_chunks_is_written_whole(tmp_path):
    journal = opened(tmp_path)
    table = pa.concat_tables([batch(0, rows=1), batch(1, rows=3)])
    journal.append(table, policy_version=0, prompts={})
    assert journal.read(0).table.equals(table.combine_chunks())


def test_a_journal_opened_again_continues_the_chain(tmp_path):
    write(tmp_path, steps=2)
    journal = Journal(tmp_path)
    assert journal.next_step == 2
    assert journal.append(batch(2), policy_version=2, prompts={"issued": 2}) == 2
    assert metadata(path(tmp_path, 2))["previous"] == hashlib.sha256(path(tmp_path, 1).read_bytes()).hexdigest()
    assert read_all(tmp_path) == [0, 1, 2]


def test_a_write_cut_short_is_removed_and_not_counted(tmp_path):
    write(tmp_path, steps=2)
    leftover = tmp_path / "step-000002.tmp"
    leftover.write_bytes(path(tmp_path, 1).read_bytes()[:100])
    journal = Journal(tmp_path)
    assert journal.next_step == 2
    assert leftover.exists()  # to open a journal changes nothing: another process may be writing it
    journal.open_for_writing()
    assert not leftover.exists()
    assert sorted(file.name for file in tmp_path.glob("*.arrow")) == ["step-000000.arrow", "step-000001.arrow"]
    journal.append(batch(2), policy_version=2, prompts={})
    assert read_all(tmp_path) == [0, 1, 2]


def test_a_changed_byte_is_found_and_the_step_named(tmp_path):
    write(tmp_path)
    change(path(tmp_path, 1))
    with pytest.raises(JournalError, match=r"step-000001\.arrow|does not follow step 1"):
        read_all(tmp_path)


def test_a_changed_byte_is_found_before_its_step_is_handed_out(tmp_path):
    journal = write(tmp_path)
    change(path(tmp_path, 1))
    with pytest.raises(JournalError, match=r"step-000001\.arrow"):
        journal.read(1)


def test_a_changed_byte_in_the_newest_file_is_found(tmp_path):
    write(tmp_path)
    change(path(tmp_path, 2))
    with pytest.raises(JournalError, match=r"step-000002\.arrow"):
        read_all(tmp_path)


@pytest.mark.parametrize("step", [0, 1])
def test_changed_metadata_is_found(tmp_path, step):
    write(tmp_path)
    change(path(tmp_path, step), b'"policy_version": %d' % step, b'"policy_version": 9')
    with pytest.raises(JournalError, match=rf"step-00000{step}\.arrow|does not follow step {step}"):
        read_all(tmp_path)


@pytest.mark.parametrize("keep", [0, 20, 400])
def test_a_file_cut_short_is_found(tmp_path, keep):
    write(tmp_path)
    file = path(tmp_path, 2)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(JournalError, match=r"step-000002\.arrow"):
        read_all(tmp_path)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_deleted_file_is_found_and_named(tmp_path, lost):
    write(tmp_path, steps=4)
    path(tmp_path, lost).unlink()
    with pytest.raises(JournalError, match=rf"step-00000{lost}\.arrow"):
        read_all(tmp_path)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_journal_with_a_gap_never_overwrites_a_step(tmp_path, lost):
    write(tmp_path, steps=4)
    path(tmp_path, lost).unlink()
    newest = path(tmp_path, 3).read_bytes()
    with pytest.raises(JournalError, match=rf"step-00000{lost}\.arrow"):
        Journal(tmp_path).append(batch(7), policy_version=7, prompts={})
    assert path(tmp_path, 3).read_bytes() == newest


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 2)])
def test_swapped_files_are_found_and_named(tmp_path, first, second):
    write(tmp_path)
    swapped = path(tmp_path, first).read_bytes()
    path(tmp_path, first).write_bytes(path(tmp_path, second).read_bytes())
    path(tmp_path, second).write_bytes(swapped)
    with pytest.raises(JournalError, match=rf"step-00000({first}|{second})\.arrow"):
        read_all(tmp_path)


def test_a_step_of_another_run_is_found(tmp_path):
    write(tmp_path / "one")
    other = opened(tmp_path / "two")
    for step in range(2):
        other.append(batch(step + 5), policy_version=step, prompts={})
    path(tmp_path / "one", 1).write_bytes(path(tmp_path / "two", 1).read_bytes())
    with pytest.raises(JournalError, match=r"step-000001\.arrow"):
        read_all(tmp_path / "one")


@pytest.mark.parametrize("version", [8, 10])
def test_a_step_of_another_layout_is_refused_by_version(tmp_path, monkeypatch, version):
    with monkeypatch.context() as other:
        other.setattr(journal_module, "SCHEMA_VERSION", version)
        write(tmp_path)
    with pytest.raises(JournalError, match=rf"step-000002\.arrow has schema {version}, .* writes 9; continue with"):
        Journal(tmp_path).last()


def test_a_step_that_was_never_written_cannot_be_read(tmp_path):
    with pytest.raises(JournalError, match=r"step-000003\.arrow"):
        write(tmp_path).read(3)


# Notes and the whole chain


def with_notes(directory):
    """begin, step 0, step 1, void of step 1, change, step 2: a chain of six."""
    journal = opened(directory)
    journal.note("begin", identity={"model": "m"}, config={"kl": {"coef": 0.1}}, versions={})
    for step in (0, 1):
        journal.append(batch(step), policy_version=step, prompts={"issued": step})
    journal.void(1, "the loss is not finite (nan)")
    journal.note("change", settings={"kl.coef": 0.2})
    journal.append(batch(2), policy_version=2, prompts={"issued": 2})
    return journal


CHAIN = [
    "note-000000-000.json", "step-000000.arrow", "step-000001.arrow", "note-000002-000.json", "note-000002-001.json",
    "step-000002.arrow",
]  # fmt: skip


def test_notes_and_steps_form_one_chain(tmp_path):
    with_notes(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*CHAIN, *(f"{name.split('.')[0]}.sha256" for name in CHAIN)}
    previous = ""
    for name in CHAIN:
        path = tmp_path / name
        entry = json.loads(path.read_text()) if path.suffix == ".json" else metadata(path)
        assert (entry["schema"], entry["previous"]) == (9, previous)
        previous = hashlib.sha256(path.read_bytes()).hexdigest()
        assert (tmp_path / f"{path.stem}.sha256").read_text() == f"{previous}  {name}\n"


def test_notes_read_back_as_they_were_written(tmp_path):
    notes = with_notes(tmp_path).notes
    again = Journal(tmp_path)
    assert list(again.notes) == list(notes)
    assert [(note.before_step, note.number, note.kind) for note in again.notes] == [
        (0, 0, "begin"),
        (2, 0, "void"),
        (2, 1, "change"),
    ]
    assert again.notes[1].fields == {
        "step": 1,
        "reason": "the loss is not finite (nan)",
        "sample_ids": ["0/10/0", "0/11/0"],
    }
    assert again.voided == {1: "the loss is not finite (nan)"}
    assert again.identity == {"model": "m"}
    again.verify()


@pytest.mark.parametrize("name", CHAIN)
@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "gone with its hash", "swapped", "hash gone"])
def test_damage_to_any_entry_is_found_and_named(tmp_path, name, damage):
    with_notes(tmp_path)
    path, other = tmp_path / name, tmp_path / CHAIN[CHAIN.index(name) - 1]
    hashes = path.with_suffix(".sha256")
    if damage == "bit":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "swapped":
        path.write_bytes(other.read_bytes())
        hashes.write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {name}\n")
    else:
        for lost in {"gone": [path], "gone with its hash": [path, hashes], "hash gone": [hashes]}[damage]:
            lost.unlink()
    if (name, damage) == (CHAIN[-1], "gone with its hash"):
        Journal(tmp_path).verify()  # without any trace the newest step cannot be missed
        return
    with pytest.raises(JournalError, match=r"(step|note)-\d{6}") as raised:
        Journal(tmp_path).verify()
    after = CHAIN[min(CHAIN.index(name) + 1, len(CHAIN) - 1)]
    assert path.stem in str(raised.value) or after.split(".")[0] in str(raised.value)


def test_a_lost_newest_step_is_noticed_by_the_hash_it_left(tmp_path):
    write(tmp_path)
    path(tmp_path, 2).unlink()
    with pytest.raises(JournalError, match=r"step-000002\.arrow is missing, but its \.sha256 is there"):
        Journal(tmp_path)


def test_a_crash_between_hash_and_rename_leaves_nothing_to_refuse(tmp_path):
    write(tmp_path)
    path(tmp_path, 2).rename(tmp_path / "step-000002.tmp")
    journal = opened(tmp_path)
    assert journal.next_step == 2
    assert {file.suffix for file in tmp_path.glob("step-000002.*")} == set()
    journal.append(batch(2), policy_version=2, prompts={})
    assert read_all(tmp_path) == [0, 1, 2]


def test_foreign_files_are_no_entries(tmp_path):
    write(tmp_path)
    for name in ("step-000001-copy.arrow", "step-0000003.arrow", "step-000003.arrow.bak", "notes.json", "x.tmp"):
        (tmp_path / name).write_bytes(b"a user's own")
    journal = opened(tmp_path)
    assert journal.next_step == 3
    journal.verify()
    assert (tmp_path / "x.tmp").exists()


def test_a_journal_that_is_not_there_is_empty_and_is_not_made(tmp_path):
    journal = Journal(tmp_path / "journal")
    assert (journal.next_step, journal.last(), list(journal.notes)) == (0, None, [])
    assert not (tmp_path / "journal").exists()


def test_begin_is_the_first_entry_and_only_there(tmp_path):
    journal = opened(tmp_path)
    with pytest.raises(ValueError, match="only begin note"):
        journal.note("change", settings={})
    journal.note("begin", identity={}, config={}, versions={})
    with pytest.raises(ValueError, match="only begin note"):
        journal.note("begin", identity={}, config={}, versions={})
    assert [note.kind for note in Journal(tmp_path).notes] == ["begin"]


def test_a_version_ends_with_the_step_before_it(tmp_path):
    journal = with_notes(tmp_path)
    for version, name in ((0, CHAIN[0]), (1, CHAIN[1]), (2, CHAIN[2]), (3, CHAIN[5])):
        assert journal.digest(version) == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert journal.digest(4) == ""


def test_a_million_steps_are_still_in_order(tmp_path):
    names = ["step-999999", "note-1000000-000", "step-1000000", "note-1000001-000"]
    places = [chain.Place(999999), chain.Place(10**6, False), chain.Place(10**6), chain.Place(10**6 + 1, False)]
    assert [place.stem for place in places] == names
    assert all(earlier < later for earlier, later in pairwise(places))


def note(before_step, kind, **fields):
    return Note(before_step, 0, kind, 0.0, fields)


def test_a_step_has_the_settings_of_its_time():
    config = {"kl": {"coef": 0.1}, "optimizer": {"learning_rate": 1e-3}}
    notes = [
        note(0, "begin", config=config, identity={}),
        note(2, "change", settings={"kl.coef": 0.2}),
        note(5, "change", settings={"kl.coef": 0.3, "ppo.target_kl": 0.5}),
    ]
    coefs = [settings_at(notes, step)["kl.coef"] for step in range(7)]
    assert coefs == [0.1, 0.1, 0.2, 0.2, 0.2, 0.3, 0.3]
    assert [settings_at(notes, step)["ppo.target_kl"] for step in (4, 5)] == [None, 0.5]
    assert settings_at(notes[:1], 3) == {}


def test_accepted_digests_replace_those_of_the_beginning():
    notes = [
        note(0, "begin", config={}, identity={"model": "m0", "critic": "c0"}),
        note(3, "accept", identity={"model": "m1"}),
    ]
    assert identity(notes) == {"model": "m1", "critic": "c0"}
    assert identity(notes, before_step=2) == {"model": "m0", "critic": "c0"}
    assert identity(notes, before_step=3) == {"model": "m1", "critic": "c0"}
