"""Bars on a terminal: one line each, with the time left; nothing where output is piped."""

from __future__ import annotations

import re

import pytest

from deploy.screen import console
from deploy.screen.bar import Bars
from deploy.screen.console import Lenient, Output, complain


@pytest.fixture
def terminal(monkeypatch) -> Output:
    monkeypatch.setattr(Lenient, "isatty", lambda self: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    return Output()


def frames(capsys) -> list[str]:
    """What was drawn, without colours and movements of the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out).replace("\r", "\n").splitlines()


def drawn(bars: Bars, capsys) -> list[str]:
    """The lines of all bars as they are now."""
    capsys.readouterr()
    bars._live.refresh()
    return [line.rstrip() for line in frames(capsys) if line.strip()]


def test_a_bar_shows_name_count_time_left_and_what_is_done(terminal, capsys):
    with Bars(terminal) as bars:
        bars.show("training", 7, 200, left_s=2340)
        bars.say("training", "step 8: 12 of 64 \x1b[2J rollouts are generated and scored, and so on and on")
        [line] = drawn(bars, capsys)
    assert line.startswith("training ")
    assert "7/200 39m left step 8: 12 of 64 \\x1b[2J" in re.sub(" +", " ", line)
    assert len(line) <= 80


def test_time_left_follows_from_the_time_that_the_work_took(terminal, capsys, monkeypatch):
    now = 100.0
    monkeypatch.setattr("deploy.screen.bar.time.monotonic", lambda: now)
    with Bars(terminal) as bars:
        bars.show("pairs", 40, 100)  # a run that continues
        assert "left" not in drawn(bars, capsys)[0]
        now = 130.0
        bars.show("pairs", 60, 100)
        [line] = drawn(bars, capsys)
    assert "60/100 60s left" in re.sub(" +", " ", line)  # 20 in 30 s; 40 are to come


def test_work_of_unknown_size_has_no_count(terminal, capsys):
    with Bars(terminal) as bars:
        bars.show("training", 0, None)
        [line] = drawn(bars, capsys)
        assert not any(character.isdigit() for character in line)
        bars.show("evaluation", 3, 8)
        assert [line.split()[0] for line in drawn(bars, capsys)] == ["training", "evaluation"]
        bars.hide("evaluation")
        assert [line.split()[0] for line in drawn(bars, capsys)] == ["training"]


def test_a_bar_leaves_nothing_and_a_visible_cursor(terminal, capsys):
    with Bars(terminal) as bars:
        bars.show("training", 7, 200)
    written = capsys.readouterr().out
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")  # shown after it was hidden
    assert written.rstrip().endswith(("\x1b[2K", "\x1b[?25h"))  # the line was erased


def test_a_message_on_standard_error_comes_after_the_bar_is_gone(terminal, capsys):
    bars = Bars(terminal)
    bars.show("training", 7, 200)
    complain("the disk is full")
    assert bars._live.live.is_started is False
    assert capsys.readouterr().err == "ratchet: the disk is full\n"
    assert console._before_complaints == []


def test_a_pipe_gets_no_bar(capsys):
    with Bars(Output()) as bars:
        bars.show("training", 7, 200)
        bars.say("training", "step 8")
    assert capsys.readouterr() == ("", "")
    assert not bars
