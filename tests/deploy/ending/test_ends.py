"""Every exception as one message and an exit code; what keeps Ray from starting is said before it is tried."""

from __future__ import annotations

import errno
import signal
import stat

import pytest

from common.config.base import RayConfig
from common.errors import RoleError, UserError
from deploy.capacity import MIB
from deploy.cluster.connection import own_cluster
from deploy.ending import ends
from deploy.ending.signals import Stopped


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run directory with something in it."""
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "config.toml").touch()
    monkeypatch.setattr(ends, "_run", (f"continue with ratchet train --resume {directory}", directory))
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
    assert ends.told(Stopped(number)) == (code, f"{what}; continue with ratchet train --resume {run}")


def test_a_full_disk_is_found_among_the_causes(run):
    error = RuntimeError("broken pool")
    error.__cause__ = ExceptionGroup("many", [OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")])
    code, message = ends.told(error)
    assert code == 2
    assert message.startswith("the disk is full under metrics.jsonl: ")
    assert message.endswith(f"make room; continue with ratchet train --resume {run}")


def test_a_full_disk_is_known_by_the_words_of_a_library_too(run):
    code, message = ends.told(ValueError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert (code, message.partition(":")[0]) == (2, f"the disk is full under {run}")


def test_a_path_that_cannot_be_used_is_the_users_to_fix(run):
    code, message = ends.told(PermissionError(errno.EACCES, "Permission denied", "/sys/nope"))
    assert (code, message.partition(";")[0]) == (2, "/sys/nope: Permission denied")


def test_a_failed_role_is_one_line_and_its_traceback_is_in_the_run(run):
    code, message = ends.told(RoleError("Learner(0) died"))
    [kept] = (run / "errors").iterdir()
    assert (code, message) == (
        1,
        f"Learner(0) died; details are in {kept}; continue with ratchet train --resume {run}",
    )


def test_what_the_user_can_fix_is_told_as_it_is(run):
    assert ends.told(UserError("raise it")) == (2, "raise it")


@pytest.mark.parametrize(
    ("mib", "free", "rule"),
    [
        (1, (8000, 8000, 8000), "must be at least"),
        (1000, (1100, 8000, 8000), "must fit into the machine's free memory, 1100 MiB"),
        (1000, (8000, 64, 500), "must fit into /dev/shm, which has 64 MiB free, or into the temporary directory, 500"),
    ],
)
def test_an_object_store_that_fits_nowhere_is_refused(mib, free, rule):
    with pytest.raises(UserError, match=rf"ray.object_store_mib \({mib}\) {rule}"):
        own_cluster.check_store(RayConfig(object_store_mib=mib), *(size * MIB for size in free))


def test_a_store_may_be_a_file_where_shared_memory_is_small():
    own_cluster.check_store(RayConfig(object_store_mib=1000), 8000 * MIB, 64 * MIB, 2000 * MIB)


def test_the_directory_of_a_cluster_is_private_short_and_gone_afterwards(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 99)))
    with own_cluster.private_directory() as directory:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        socket = f"{directory}/r/session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store.1"
        assert len(socket) <= 107
    assert not directory.exists()


def test_the_token_is_its_owners_alone(tmp_path, monkeypatch):
    for variable in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    own_cluster._make_token_private()
    path = tmp_path / ".ray/auth_token"
    token = path.read_text()
    path.chmod(0o644)  # as Ray itself writes it
    own_cluster._make_token_private()
    assert (stat.S_IMODE(path.stat().st_mode), path.read_text(), len(token)) == (0o600, token, 64)
