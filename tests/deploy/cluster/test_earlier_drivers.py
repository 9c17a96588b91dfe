"""A driver waits for processes of earlier drivers of its run, and for no others. The cluster's tables are made up."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from common.errors import RoleError
from deploy.cluster import earlier_drivers
from deploy.cluster.earlier_drivers import RUN_OF_JOB, run_of_job, wait_for_earlier_drivers

HERE, ELSEWHERE = "10.0.0.1", "10.0.0.2"


class Tables(dict):
    """The actors of each job, and how often somebody has looked."""

    def __init__(self, actors):
        super().__init__(actors)
        self.looks = []


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """The actors of three jobs: an earlier one of this run (1), one of another run (2) and this driver's own (3)."""
    actors = Tables({b"\x01": [], b"\x02": [], b"\x03": []})
    runs = {b"\x01": tmp_path, b"\x02": tmp_path / "another", b"\x03": tmp_path}
    jobs = {
        job: SimpleNamespace(config=SimpleNamespace(metadata={RUN_OF_JOB: run_of_job(run)}))
        for job, run in runs.items()
    }
    client = SimpleNamespace(get_all_job_info=lambda **_: (actors.looks.append(1), jobs)[1])
    context = SimpleNamespace(gcs_address="", get_job_id=lambda: b"\x03".hex())
    ray = SimpleNamespace(get_runtime_context=lambda: context, util=SimpleNamespace(get_node_ip_address=lambda: HERE))
    monkeypatch.setattr(earlier_drivers, "ray", ray)
    monkeypatch.setattr(earlier_drivers, "GcsClient", lambda address: client)
    listed = SimpleNamespace(actors=lambda job_id: dict(enumerate(actors[job_id])))
    monkeypatch.setattr(earlier_drivers, "ray_state", listed)
    return actors


@pytest.fixture
def process():
    """A process of this machine."""
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield started
    started.kill()
    started.wait()


def entry(pid, *, state="DEAD", where=HERE, ended_s=None):
    """An actor in Ray's table. A dead one ended after every process of the test began, by default."""
    end = time.time() + 60 if ended_s is None else ended_s
    address = {"IPAddress": where}
    return {"State": state, "Pid": pid, "Address": address, "EndTime": end * 1000, "Name": "Learner(0)"}


def test_an_actor_whose_process_is_still_there_is_waited_for(tmp_path, tables, process):
    tables[b"\x01"].append(entry(process.pid))
    waiting = threading.Thread(target=wait_for_earlier_drivers, args=(tmp_path,), daemon=True)
    waiting.start()
    while len(tables.looks) < 3:  # it looks again and again
        assert waiting.is_alive()
        time.sleep(0.01)
    process.kill()  # not waited for yet: a zombie has no memory
    waiting.join(10)
    assert not waiting.is_alive()


def test_an_actor_that_stays_alive_is_named_when_the_time_is_up(tmp_path, tables, monkeypatch):
    monkeypatch.setattr(earlier_drivers, "GONE_S", 0.3)
    tables[b"\x01"].append(entry(77, state="ALIVE", where=ELSEWHERE))
    with pytest.raises(RoleError, match=rf"still alive after 0.3 s: Learner\(0\) \(process 77, {ELSEWHERE}\); end"):
        wait_for_earlier_drivers(tmp_path)


def test_other_runs_other_machines_and_reused_numbers_are_not_waited_for(tmp_path, tables, process, monkeypatch):
    monkeypatch.setattr(earlier_drivers, "GONE_S", 0.3)
    tables[b"\x01"] += [entry(process.pid, ended_s=time.time() - 3600), entry(process.pid, where=ELSEWHERE), entry(0)]
    tables[b"\x02"].append(entry(process.pid, state="ALIVE"))
    tables[b"\x03"].append(entry(process.pid, state="ALIVE"))
    wait_for_earlier_drivers(tmp_path)
