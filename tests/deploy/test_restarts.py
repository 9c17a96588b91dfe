"""The parent of the driver: which ends it answers with a restart, and with which command. The drivers are scripts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from deploy import restarts
from deploy.restarts import Supervisor, without_restarts

ROOT = Path(__file__).parents[2]
BEGIN = ["train", "tiny.toml", "seed=1", "--force", "--run", "run"]
CONTINUE = ["train", "--resume", "run"]
# Writes its arguments into a file, and then does what the plan says for the start with this number.
DRIVER = """
import json, os, signal, sys, time
from pathlib import Path

starts = Path("starts.jsonl")
with open(starts, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
acts = json.loads(Path("plan.json").read_text())[len(starts.read_text().splitlines()) - 1]
for act in acts.split():
    if act == "begin":
        Path("run/journal").mkdir(parents=True, exist_ok=True)
        Path("run/config.new").write_text("num_steps = 1")
        os.rename("run/config.new", "run/config.toml")
    elif act == "step":
        Path(f"run/journal/step-{len(os.listdir('run/journal')):06d}.arrow").touch()
    elif act == "trap":
        signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    elif act == "wait":
        Path("waits").touch()
        time.sleep(60)
    elif act.startswith("kill"):
        os.kill(os.getpid(), int(act[4:]))
    else:
        os._exit(int(act))
"""


@pytest.fixture
def supervised(tmp_path, monkeypatch, capsys):
    """Runs a supervisor over drivers that follow a plan. Returns its exit code, the arguments of each start, and what
    it printed."""
    monkeypatch.chdir(tmp_path)
    Path("driver.py").write_text(DRIVER)
    monkeypatch.setattr(restarts, "driver_command", lambda arguments: [sys.executable, "driver.py", *arguments])
    monkeypatch.setattr(restarts, "PAUSE_S", 0.0)

    def run(*plan, resume=False, times=9):
        Path("plan.json").write_text(json.dumps(plan))
        Path("starts.jsonl").unlink(missing_ok=True)
        arguments = CONTINUE if resume else BEGIN
        code = Supervisor(arguments, Path("run"), resume=resume, restarts=times).run()
        starts = [json.loads(line) for line in Path("starts.jsonl").read_text().splitlines()]
        return code, starts, capsys.readouterr().err

    return run


def test_a_failed_run_continues_until_it_is_done(supervised):
    code, starts, told = supervised("begin 1", "step kill9", "1", "0")
    assert (code, starts) == (0, [BEGIN, CONTINUE, CONTINUE, CONTINUE])
    causes = ["", "the driver was ended by SIGKILL; ", ""]
    lines = [f"ratchet: {why}restart {n} of 9: ratchet train --resume run" for n, why in enumerate(causes, 1)]
    assert told.splitlines() == lines


@pytest.mark.parametrize("code", [0, 2, 129, 130, 143])
def test_success_a_users_fault_and_a_users_signal_end_the_run(supervised, code):
    assert supervised(f"begin {code}", "0") == (code, [BEGIN], "")


@pytest.mark.parametrize(("act", "code"), [("kill9", 137), ("kill6", 134), ("1", 1), ("77", 77)])
def test_the_last_failure_is_the_exit_code(supervised, act, code):
    ended, starts, told = supervised(f"begin {act}", act, act, times=2)
    assert (ended, starts) == (code, [BEGIN, CONTINUE, CONTINUE])
    end = "the run has used up its 2 restarts (--restarts); continue with ratchet train --resume run"
    why = {"kill9": "the driver was ended by SIGKILL; ", "kill6": "the driver was ended by SIGABRT; "}.get(act, "")
    assert told.splitlines()[-1] == f"ratchet: {why}{end}"


def test_a_run_that_had_not_begun_begins_again(supervised):
    assert supervised("kill9", "begin 1", "0")[1] == [BEGIN, BEGIN, CONTINUE]


def test_the_config_of_a_run_that_force_replaces_is_no_beginning(supervised):
    Path("run").mkdir()
    Path("run/config.toml").write_text("num_steps = 7")
    assert supervised("1", "begin 1", "0")[1] == [BEGIN, BEGIN, CONTINUE]


def test_a_continued_run_keeps_its_own_arguments(supervised):
    assert supervised("1", "begin 1", "0", resume=True)[1] == [CONTINUE] * 3


def signal_when(condition, number):
    """Sends a signal to this process once the condition holds."""

    def send():
        while not condition():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.parametrize("plan", ["begin trap wait", "wait"])
def test_a_signal_is_forwarded_and_ends_the_run(supervised, plan):
    """The second driver has no handler yet, and is killed."""
    before = signal.getsignal(signal.SIGTERM)
    signal_when(Path("waits").exists, signal.SIGTERM)
    code, starts, told = supervised(plan, "0")
    assert (code, len(starts), told) == (143, 1, "")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_during_a_pause_ends_the_run(supervised, monkeypatch):
    pause = Supervisor._pause

    def noted(self, fruitless):
        if fruitless > 1:
            Path("pauses").touch()
        pause(self, fruitless)

    monkeypatch.setattr(restarts, "PAUSE_S", 600.0)
    monkeypatch.setattr(Supervisor, "_pause", noted)
    signal_when(Path("pauses").exists, signal.SIGTERM)  # a shell's background job ignores SIGINT
    code, starts, told = supervised("begin 1", "1", "0")
    assert code == 143
    assert len(starts) == 2
    assert told.endswith("stopped by SIGTERM; continue with ratchet train --resume run\n")


def test_pauses_grow_until_the_journal_does(supervised, monkeypatch):
    pauses = []
    monkeypatch.setattr(Supervisor, "_pause", lambda self, fruitless: pauses.append(fruitless))
    supervised("begin 1", "1", "1", "step 1", "1", "0")
    assert pauses == [1, 2, 3, 0, 1]


def test_a_suspended_driver_is_killed_and_replaced(supervised, monkeypatch):
    monkeypatch.setattr(restarts, "LOOK_EVERY_S", 0.01)
    code, starts, told = supervised(f"begin kill{int(signal.SIGSTOP)} 3", "0")
    assert (code, starts) == (0, [BEGIN, CONTINUE])
    assert "has been suspended for 0.3 s: killed\n" in told


def test_the_option_is_taken_out_of_the_arguments():
    assert without_restarts(["train", "a.toml", "--restarts", "3", "seed=1"]) == ["train", "a.toml", "seed=1"]
    assert without_restarts(["train", "--restarts=3", "--resume", "run"]) == ["train", "--resume", "run"]


def test_the_parent_imports_neither_torch_nor_ray_and_passes_the_exit_code_on(tmp_path):
    code = """
import sys
from deploy.restarts import Supervisor
run = Supervisor.run
def checked(self):
    code = run(self)
    print(sorted({"torch", "ray", "transformers", "vllm"} & set(sys.modules)), self._restarts)
    return code
Supervisor.run = checked
from deploy.cli import main
main()
"""
    command = [sys.executable, "-P", "-c", code, "train", "nowhere.toml", "--restarts", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "[] 2\n")
    assert done.stderr == "ratchet: config file nowhere.toml does not exist; ratchet config --list has shipped ones\n"
