"""RUN/log.txt: lines with time and source, warnings, a bound on its size, a disk that is full."""

from __future__ import annotations

import re
import warnings

import deploy.run.log
from deploy.run.log import RunLog


def test_each_line_has_a_time_and_its_source(tmp_path):
    log = RunLog()
    log.open(tmp_path)
    log.write("Generator(0) (pid 7)", "ready \x1b[2J")
    log.warn("the checkpoint is set aside")
    log.close()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", line) for line in lines)
    assert [line[24:] for line in lines] == [
        "Generator(0) (pid 7): ready \\x1b[2J",
        "ratchet: warning: the checkpoint is set aside",
    ]
    assert log.warnings == 1


def test_a_log_that_is_opened_again_continues(tmp_path):
    for text in ("one", "two"):
        log = RunLog()
        log.open(tmp_path)
        log.write("Learner(0)", text)
        log.close()
    assert [line[24:] for line in (tmp_path / "log.txt").read_text().splitlines()] == [
        "Learner(0): one",
        "Learner(0): two",
    ]


def test_a_warning_of_python_code_is_one_about_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    log = RunLog()
    log.open(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with log.python_warnings():
            warnings.warn("old tokenizer", FutureWarning, stacklevel=1)
    log.close()
    assert re.search(
        r"ratchet: warning: FutureWarning: old tokenizer \(.*test_log.py, line \d+\)",
        (tmp_path / "log.txt").read_text(),
    )


def test_without_a_run_directory_a_warning_goes_to_standard_error(capsys):
    log = RunLog()
    log.warn("look")
    log.write("Reward(0)", "nobody reads this")
    assert capsys.readouterr() == ("", "ratchet: look\n")


def test_a_log_that_nobody_writes_to_makes_no_file(tmp_path):
    log = RunLog()
    log.open(tmp_path)
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_a_long_log_keeps_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(deploy.run.log, "MOST_BYTES", 1000)
    log = RunLog()
    log.open(tmp_path)
    for number in range(100):
        log.write("Generator(0)", f"line {number}")
    log.close()
    assert {path.name for path in tmp_path.iterdir()} == {"log.txt", "log.txt.1"}
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())
    assert (tmp_path / "log.txt").read_text().endswith("line 99\n")


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path, capsys):
    log = RunLog()
    log.open(tmp_path / "gone")
    log.write("Generator(0)", "line")
    log.warn("warning")
    log.close()
    assert capsys.readouterr() == ("", "")
