"""Files written whole or not at all."""

import json
import math
import os
import stat
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import (
    append_record,
    check_replaces,
    read_records,
    replaced_directory,
    write_durably,
    write_json,
    write_whole,
)


def test_a_file_is_replaced_and_nothing_else_is_left_behind(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"seed": 0})
    write_json(path, {"seed": 1, "name": "ä"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"seed": 1, "name": "ä"}
    write_whole(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [write_whole, write_durably])
def test_a_file_that_cannot_be_written_to_its_end_stays_what_it_was(tmp_path, write):
    path = tmp_path / "scale.json"
    write(path, "old")
    with pytest.raises(UnicodeEncodeError):  # after the file was opened
        write(path, "new \ud800")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def disk_events(monkeypatch):
    """The calls of fsync and rename, in order."""
    events, sync, rename = [], os.fsync, Path.rename

    def fsync(descriptor):
        status = os.fstat(descriptor)
        events.append("sync directory" if stat.S_ISDIR(status.st_mode) else f"sync {status.st_size} bytes")
        sync(descriptor)

    def renamed(path, target):
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    return events


def test_a_durable_file_is_synced_before_its_rename_and_its_directory_after(tmp_path, disk_events):
    write_durably(tmp_path / "COMPLETE", "whole")
    assert disk_events == ["sync 5 bytes", "rename", "sync directory"]
    assert (tmp_path / "COMPLETE").read_text() == "whole"


def test_a_directory_is_synced_with_all_its_files_before_it_replaces_the_old_one(tmp_path, disk_events):
    (tmp_path / "policy").mkdir()
    with replaced_directory(tmp_path / "policy") as staging:
        (staging / "parts").mkdir()
        (staging / "parts/weights").write_bytes(b"12345")
        (staging / "config").write_bytes(b"123")
    *files, whole, old, new, parent = disk_events
    assert sorted(files) == ["sync 3 bytes", "sync 5 bytes", "sync directory"]
    assert [whole, old, new, parent] == ["sync directory", "rename", "rename", "sync directory"]
    assert (tmp_path / "policy/parts/weights").read_bytes() == b"12345"


def test_a_command_replaces_only_files_with_its_beginning(tmp_path):
    path = tmp_path / "settings.yml"

    def check():
        check_replaces(path, "# ä.", "ratchet x", otherwise="another file")

    check()  # there is no file
    for text in ("", "# ä.", "# ä.\nmine: 1\n"):
        path.write_text(text, encoding="utf-8")
        check()
    for text in ("#", "mine: 1\n# ä.\n"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"yml does not begin like the files that ratchet x writes"):
            check()
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"; delete it or name another file$"):
        check()


def test_records_come_back_in_order_and_a_missing_file_has_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_records(path) == []
    records = [{"step": 0, "text": "zwei\nZeilen"}, {"step": 1, "value": 0.1}]
    for record in records:
        append_record(path, record)
    assert read_records(path) == records


def test_a_whole_number_that_no_float_can_hold_is_read_as_infinite(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for digits in (15, 298, 299, 400, 9000):
        path.write_text(f'{{"step": 3, "high": 1{"0" * digits}, "low": [-1{"0" * digits}], "text": "1{"0" * 400}"}}\n')
        [record] = read_records(path)
        assert record["step"] == 3
        assert isinstance(record["step"], int)
        assert record["text"] == f"1{'0' * 400}"
        expected = 10**digits if digits < 309 else math.inf
        assert float(record["high"]) == float(expected)  # raises OverflowError for too large an int
        assert float(record["low"][0]) == -float(expected)
