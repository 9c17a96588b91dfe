"""Every exception becomes one message and an exit code."""

from __future__ import annotations

import errno
import signal

import pytest

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


def test_a_user_error_is_printed_unchanged(run):
    assert code_and_message(UserError("raise it")) == (2, "raise it")
