"""The private directory of a run's own cluster, its token, and the check of its object store."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from ray.job_config import JobConfig

from common.config.base import RayConfig
from common.errors import RoleError, UserError
from common.memory import MIB
from deploy.cluster import own_cluster

ROOT = Path(__file__).parents[3]


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
        own_cluster.check_store(mib, *(size * MIB for size in free))


def test_a_store_that_ray_will_keep_in_a_file_is_allowed_with_a_warning(capsys):
    own_cluster.check_store(1000, 8000 * MIB, 64 * MIB, 2000 * MIB)
    assert "ray.object_store_mib (1000) does not fit into /dev/shm, which has 64 MiB free" in capsys.readouterr().err
    own_cluster.check_store(1000, 8000 * MIB, 1000 * MIB, 2000 * MIB)
    assert capsys.readouterr().err == ""


def test_rays_dashboard_is_told_where_prometheus_and_grafana_are(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_GRAFANA_HOST", "http://before:3000")
    started = {}
    monkeypatch.setattr(own_cluster.ray, "init", lambda **arguments: started.update(os.environ))
    cfg = RayConfig(prometheus="http://127.0.0.1:9090/", grafana_dashboards="grafana/dashboards")
    own_cluster.start(cfg, tmp_path, JobConfig())
    assert started["RAY_PROMETHEUS_HOST"] == "http://127.0.0.1:9090"
    assert started["RAY_GRAFANA_HOST"] == "http://before:3000"  # not given, so Ray's variable stays
    assert started["RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"] == f"{tmp_path}/grafana/dashboards"
    assert started["TMPDIR"] == str(tmp_path)
    assert "RAY_PROMETHEUS_HOST" not in os.environ
    with pytest.raises(ValueError, match="prometheus"):
        RayConfig(prometheus="http://user:secret@host:9090")


def test_a_node_that_does_not_start_in_time_is_no_fault_of_ratchet(monkeypatch, tmp_path):
    def init(**arguments: object) -> None:
        raise Exception("The current node timed out during startup.")  # as Ray raises it

    monkeypatch.setattr(own_cluster.ray, "init", init)
    with pytest.raises(RoleError, match="Ray cannot start on this machine: The current node timed out"):
        own_cluster.start(RayConfig(), tmp_path, JobConfig())


def test_the_directory_of_a_cluster_is_private_and_removed_afterwards(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 99)))
    with own_cluster.private_directory() as directory:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        socket = f"{directory}/r/session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store.1"
        assert len(socket) <= 107
    assert not directory.exists()


@pytest.fixture
def token_home(tmp_path, monkeypatch):
    for variable in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_of_two_starts_neither_sees_a_token_that_is_not_written_yet(token_home, monkeypatch):
    path, link = token_home / ".ray/auth_token", os.link

    def late(source, target):
        assert not path.exists()  # nobody can have seen a part of it
        own_cluster.os.link = link
        own_cluster._make_token_private()  # the other start
        link(source, target)

    monkeypatch.setattr(own_cluster.os, "link", late)
    own_cluster._make_token_private()
    assert len(path.read_text()) == 64
    assert [entry.name for entry in path.parent.iterdir()] == ["auth_token"]


# Its arguments: a directory for clusters' directories. This process takes over orphans, as `systemd --user` does, and
# does not wait for them. The grandchild is a process of a cluster whose driver, the child, is gone.
SUBREAPER = """
import ctypes, os, subprocess, sys
from pathlib import Path
base = Path(sys.argv[1])
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
left = base / "ratchet-ray-12345678"
left.mkdir()
(left / "in-use").touch()
child = "from subprocess import *; print(Popen(['sleep', '60'], stdout=DEVNULL, stderr=DEVNULL).pid)"
found = subprocess.run([sys.executable, "-c", child], env={**os.environ, "TMPDIR": str(left)}, capture_output=True)
pid = int(found.stdout)
from deploy.cluster import own_cluster
assert own_cluster._processes_of(left) == {pid}
own_cluster._sweep(str(base))
print(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0], left.exists())
"""


def test_processes_of_a_dead_driver_are_gone_before_the_next_cluster(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-c", SUBREAPER, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "Z False\n", done.stderr  # dead: it has no memory, only its parent has not noticed


@pytest.mark.parametrize(
    ("title", "mode", "belongs"),
    [("ray::agent", "a", True), ("ray::agent", "r+", True), ("ray::agent", "r", False), ("forked", "a", False)],
)
def test_an_agent_that_writes_into_rays_part_belongs_to_its_cluster(tmp_path, title, mode, belongs):
    real, link = tmp_path / "real", tmp_path / "link"
    log = real / "r/session/logs/agent.log"
    log.parent.mkdir(parents=True)
    log.touch()
    link.symlink_to(real)
    code = f"import sys; file = open({str(log)!r}, {mode!r}); print('open', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([title, "-c", code], executable=sys.executable, **pipes) as process:
        process.stdout.readline()
        found = own_cluster._processes_of(link)
        process.stdin.close()
    assert found == ({process.pid} if belongs else set())


def test_the_directory_of_a_live_command_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(own_cluster, "_temporary_directory", lambda: str(tmp_path))
    with own_cluster.private_directory() as directory:
        command = [sys.executable, "-c", "import time; time.sleep(60)"]
        process = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(directory)})
        own_cluster._sweep(str(tmp_path))
        assert directory.exists()
        assert process.poll() is None
    assert process.wait(timeout=10) == -9  # at the end, `remove` ends it


def test_only_its_owner_can_read_the_token(token_home):
    own_cluster._make_token_private()
    path = token_home / ".ray/auth_token"
    token = path.read_text()
    path.chmod(0o644)  # as Ray itself writes it
    own_cluster._make_token_private()
    assert (stat.S_IMODE(path.stat().st_mode), path.read_text(), len(token)) == (0o600, token, 64)
