"""The private directory of a run's own cluster, its token, and the check of its object store."""

from __future__ import annotations

import stat

import pytest

from common.config.base import RayConfig
from common.errors import UserError
from deploy.capacity import MIB
from deploy.cluster import own_cluster


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


def test_the_directory_of_a_cluster_is_private_and_removed_afterwards(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 99)))
    with own_cluster.private_directory() as directory:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        socket = f"{directory}/r/session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store.1"
        assert len(socket) <= 107
    assert not directory.exists()


def test_only_its_owner_can_read_the_token(tmp_path, monkeypatch):
    for variable in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    own_cluster._make_token_private()
    path = tmp_path / ".ray/auth_token"
    token = path.read_text()
    path.chmod(0o644)  # as Ray itself writes it
    own_cluster._make_token_private()
    assert (stat.S_IMODE(path.stat().st_mode), path.read_text(), len(token)) == (0o600, token, 64)
