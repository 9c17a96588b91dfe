"""The process of a role, without Ray: its import path and its cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from ray._private import ray_constants

from actors.pool.ray_actor import pin, worker_environment
from common.config.base import Placed
from common.config.training import TrainerConfig
from common.errors import UserError
from common.user_code.import_path import find_users_modules

PINNED = """
import json, os, sys, threading
from actors.pool.ray_actor import pin

affinities, done = [], threading.Event()

def begin():
    thread = threading.Thread(target=done.wait)
    thread.start()
    return thread

early = begin()
pin("Generator(0)", json.loads(sys.argv[1]))
late = begin()
print(json.dumps([sorted(os.sched_getaffinity(thread)) for thread in (0, early.native_id, late.native_id)]))
done.set()
"""


def test_a_role_finds_the_users_modules_where_the_driver_does(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    home = tmp_path / "é 設定"
    home.mkdir()
    (home / "users_module.py").write_text("FOUND = 1")
    find_users_modules(home)
    environment = worker_environment(Placed())
    hook = environment[ray_constants.WORKER_PROCESS_SETUP_HOOK_ENV_VAR]
    script = f"import {hook.rpartition('.')[0]}; {hook}(); import users_module; print(users_module.FOUND)"
    started = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", script], cwd="/", env=started, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr
    find_users_modules()


def test_a_role_without_a_gpu_sees_none():
    assert worker_environment(Placed())["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in worker_environment(Placed(gpus=0.3))  # Ray sets it


def test_a_deterministic_trainer_gives_cublas_its_workspace():
    assert worker_environment(TrainerConfig(deterministic=True, gpus=1))["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert "CUBLAS_WORKSPACE_CONFIG" not in worker_environment(TrainerConfig(gpus=1))


def test_existing_and_later_threads_are_pinned_to_the_cores():
    core = max(os.sched_getaffinity(0))
    done = subprocess.run(
        [sys.executable, "-c", PINNED, json.dumps([core])], capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(done.stdout) == [[core]] * 3


def test_a_missing_core_is_refused_with_the_existing_ones_named():
    before = os.sched_getaffinity(0)
    with pytest.raises(UserError) as caught:
        pin("Generator(0)", [min(before), 4096])
    assert str(caught.value) == (
        f"Generator(0): cores [4096] are not among those that its machine offers, {sorted(before)}; change `cores` in "
        "its section, or leave it out"
    )
    assert os.sched_getaffinity(0) == before
