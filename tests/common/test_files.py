"""Files written whole or not at all."""

import json

import pytest

from common.files import append_record, read_records, write_json, write_whole


def test_a_file_is_replaced_and_nothing_else_is_left_behind(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"seed": 0})
    write_json(path, {"seed": 1, "name": "ä"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"seed": 1, "name": "ä"}
    write_whole(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_to_its_end_stays_what_it_was(tmp_path):
    path = tmp_path / "scale.json"
    write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):  # after the file was opened
        write_whole(path, "new \ud800")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_records_come_back_in_order_and_a_missing_file_has_none(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_records(path) == []
    records = [{"step": 0, "text": "zwei\nZeilen"}, {"step": 1, "value": 0.1}]
    for record in records:
        append_record(path, record)
    assert read_records(path) == records
