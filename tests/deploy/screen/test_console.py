"""Text on the terminal is harmless, and a terminal that fails does not end the run."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from deploy.screen.console import Output, printable

PRINTS = """
from deploy.screen.console import Output, complain
from rich.table import Table
out = Output()
for number in range(3000):
    out.print(f"line {number} \\u00b7 \\u8a71 " + "x" * 50)
table = Table("a")
table.add_row("\\u03c3")
out.print(table)
out.rule("r")
complain("the end")
"""


def in_shell(command: str, code: str = PRINTS, **environment: str) -> subprocess.CompletedProcess:
    """A Python program at the place of {} in a bash command line."""
    line = "set -o pipefail; " + command.replace("{}", f'{sys.executable} -c "$CODE"')
    root = str(Path(__file__).parents[3])
    variables = {"CODE": code, "PYTHONPATH": root, "PATH": "/usr/bin:/bin", **environment}
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=variables, timeout=60)


@pytest.mark.parametrize("command", ["{} | head -1", "{} > /dev/full", "{} >&-"])
def test_an_output_that_cannot_be_written_ends_nothing(command):
    done = in_shell(command)
    assert (done.returncode, done.stderr) == (0, "ratchet: the end\n")


def test_an_error_stream_that_cannot_be_written_ends_nothing():
    assert in_shell("{} 2> /dev/full >/dev/null").returncode == 0


def test_what_the_terminal_cannot_encode_becomes_question_marks():
    done = in_shell("{}", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stdout.startswith("line 0 ? ? xxx")
    assert done.stdout.count("\n") > 3000


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]52;c;aGk=\x07", "\\x1b]52;c;aGk=\\x07"),
        ("\x1b[2J\x9b2J", "\\x1b[2J\\x9b2J"),
        ("over\rwritten\r\nnext\tcolumn\n", "over\\x0dwritten\nnext\tcolumn\n"),
        ("a\u202eb\u2028c", "a\\u202eb\\u2028c"),
        ("half \ud83d pair", "half \\ud83d pair"),
        ("Käse · 話 · क्‍ष · \U0001f469‍\U0001f52c", "Käse · 話 · क्‍ष · \U0001f469‍\U0001f52c"),
    ],
)
def test_control_characters_are_written_out_and_letters_stay(text, shown):
    assert printable(text) == shown


def test_no_escape_reaches_the_terminal_through_text_tables_or_rules(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    out, hostile = Output(), "\x1b[2J\x07"
    table = Table(hostile, title=hostile)
    table.add_row(hostile)
    out.print(hostile)
    out.print(table)
    out.rule(hostile)
    assert terminal.getvalue().count("\\x1b[2J\\x07") == 5
    assert not {"\x1b", "\x07"} & set(terminal.getvalue())
