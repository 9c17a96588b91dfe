"""Every exception becomes one message and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import typer

from common.errors import RoleError, UserError
from deploy.ending import exit_message
from deploy.ending.exit_message import code_and_message
from deploy.ending.signals import Stopped


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run directory with something in it."""
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "config.toml").touch()
    monkeypatch.setattr(exit_message, "_run", (f"continue with ratchet train --resume {directory}", directory))
    return directory


@pytest.mark.parametrize(
    ("number", "code", "what"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "stopped by SIGTERM"),
        (signal.SIGHUP, 129, "stopped by SIGHUP"),
    ],
)
def test_a_signal_has_its_own_code_and_says_how_to_continue(run, number, code, what):
    assert code_and_message(Stopped(number)) == (
        code,
        f"{what}; continue with ratchet train --resume {run}",
    )


def test_a_full_disk_is_found_among_the_causes(run):
    error = RuntimeError("broken pool")
    error.__cause__ = ExceptionGroup("many", [OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")])
    code, message = code_and_message(error)
    assert code == 2
    assert message.startswith("the disk is full under metrics.jsonl: ")
    assert message.endswith(f"free some space; continue with ratchet train --resume {run}")


def test_a_full_disk_is_recognised_by_its_words_without_a_number(run):
    code, message = code_and_message(
        ValueError("Error while serializing: I/O error: No space left on device (os error 28)")
    )
    assert (code, message.partition(":")[0]) == (2, f"the disk is full under {run}")


def test_an_unusable_path_is_the_users_fault(run):
    code, message = code_and_message(PermissionError(errno.EACCES, "Permission denied", "/sys/nope"))
    assert (code, message.partition(";")[0]) == (2, "/sys/nope: Permission denied")


def test_a_failed_role_is_one_line_and_its_traceback_is_saved(run):
    code, message = code_and_message(RoleError("Learner(0) died"))
    [kept] = (run / "errors").iterdir()
    assert (code, message) == (
        1,
        f"Learner(0) died; details are in {kept}; continue with ratchet train --resume {run}",
    )


def broken_pipe():
    raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize("end", [broken_pipe, lambda: typer.main.get_command(made_app(broken_pipe))([])])
def test_an_output_without_a_reader_is_no_fault_of_ratchet(end, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as ended:
            exit_message.main(end)
    assert (ended.value.code, capsys.readouterr().err) == (141, "")


def test_a_connection_that_breaks_is_still_a_fault(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    reading, writing = os.pipe()
    with open(writing, "w") as pipe, open(reading):
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as ended:
            exit_message.main(broken_pipe)
    assert ended.value.code == 1
    assert "ratchet: BrokenPipeError: " in capsys.readouterr().err


def made_app(work):
    app = typer.Typer()
    app.command()(work)
    return app


def test_a_user_error_is_printed_unchanged(run):
    assert code_and_message(UserError("raise it")) == (2, "raise it")


STARTS = """
import os, runpy, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it

class Interrupted:
    def find_spec(name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupted)
sys.argv = [sys.argv[1]]
runpy.run_module("deploy.cli", run_name=sys.argv[0] if sys.argv[0] == "__main__" else "deploy.cli")
"""


@pytest.mark.parametrize(("program", "traceback"), [("ratchet", False), ("__main__", False), ("users_program", True)])
def test_ctrl_c_while_the_program_is_imported_prints_no_traceback(program, traceback):
    root = str(Path(__file__).parents[3])
    ended = subprocess.run([sys.executable, "-c", STARTS, program], cwd=root, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGINT
    assert ("Traceback" in ended.stderr) is traceback
