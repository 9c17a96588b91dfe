"""The Slurm script with fake programs of Slurm, Ray and Ratchet: what it starts, and what it does at the time limit."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import deploy.cluster

SCRIPT = Path(deploy.cluster.__file__).parent / "slurm" / "ratchet.sbatch"
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
FAKES = {
    # Runs what it is given on "another node": here.
    "srun": 'echo "srun $*" >> "$LOG"; while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
    # The node's own name may be that of its loopback.
    "getent": '[ "$1 $2" = "ahostsv4 node1" ] && printf "%s STREAM node1\\n" $ADDRESSES',
    "ray": """
        size=$(wc -c < "$RAY_AUTH_TOKEN_PATH") mode=$(stat -c %a "$RAY_AUTH_TOKEN_PATH")
        echo "ray $* token=$RAY_AUTH_MODE,$size,$mode" >> "$LOG"
        exec sleep 1000""",
    # The number of nodes that have joined: all, once both calls of `ray start` are there.
    "python3": '[ "$(grep -c "^ray " "$LOG")" = 2 ] && wc -l < "$SLURM_JOB_NODELIST"',
    "scontrol": """
        case "$1 $2" in
            "show hostnames") cat "$3";;
            "show job") echo "JobId=$3 JobState=$STATE";;
            *) echo "scontrol $*" >> "$LOG";;
        esac""",
    # A new run works until SIGTERM, and then says how such a run ends. A continued one is done at once.
    "ratchet": """
        echo "ratchet $*" >> "$LOG"
        [ "$2" = --resume ] && exit 0
        trap 'echo checkpoint >> "$LOG"; touch $MADE; exit ${STOPPED:-143}' TERM
        [ -n "$ENDS" ] && exit "$ENDS"
        mkdir -p "$RUN/journal" && touch "$RUN/config.toml"
        while :; do sleep 0.05; done""",
}


@pytest.fixture
def start(tmp_path):
    """Starts the script as Slurm would."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in FAKES.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "nodes").write_text("node1\nnode2\nnode3\n")
    started = []

    def begin(state="RUNNING", ends="", **more):
        (tmp_path / "log").unlink(missing_ok=True)
        environment = {
            "PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(tmp_path), "LOG": str(tmp_path / "log"),
            "RUN": str(tmp_path / "run"), "STATE": state, "ENDS": ends, "SLURM_JOB_ID": "71234",
            "ADDRESSES": "127.0.1.1 10.1.2.3 10.9.9.9", "MADE": str(tmp_path / "run/journal/step-000001.arrow"),
            "SLURM_JOB_NODELIST": str(tmp_path / "nodes"), "SLURM_CPUS_PER_TASK": "6", "SLURM_GPUS_ON_NODE": "2",
            **more,
        }  # fmt: skip
        arguments = ["bash", SCRIPT, "my.toml", tmp_path / "run", "seed=3"]
        process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def log(tmp_path):
    found = tmp_path / "log"
    return found.read_text().splitlines() if found.exists() else []


def stop(process, tmp_path):
    """Sends SIGTERM once the run has begun, as Slurm does before the time limit."""
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "config.toml").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    return process.returncode


def test_a_run_is_queued_again_at_the_time_limit_and_resumed(start, tmp_path):
    assert stop(start(), tmp_path) == 143
    lines, run = log(tmp_path), tmp_path / "run"
    options = "checkpoint.on_signal=true --restarts 3 --address 10.1.2.3:21234"
    assert f"ratchet train my.toml --run {run} seed=3 {options}" in lines
    assert lines[-2:] == ["checkpoint", "scontrol requeue 71234"]

    again = start()
    again.communicate(timeout=60)
    assert again.returncode == 0
    lines = log(tmp_path)
    assert f"ratchet train --resume {run} {options}" in lines
    assert not [line for line in lines if line.startswith("scontrol")]  # it is done


def test_every_node_starts_with_the_token_and_its_resources(start, tmp_path):
    assert stop(start(), tmp_path) == 143
    lines = log(tmp_path)
    head, others = sorted(line for line in lines if line.startswith("srun") and "ray start" in line)
    assert "--nodes=1 --ntasks=1 --nodelist=node1 " in head
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1 --exclude=node1 " in others
    first, second = sorted(line for line in lines if line.startswith("ray "))
    common = "--num-cpus=6 --num-gpus=2 --block token=token,64,600"
    assert first == f"ray start --address=10.1.2.3:21234 {common}"
    assert second == f"ray start --head --node-ip-address=10.1.2.3 --port=21234 {common}"
    assert not list((tmp_path / ".ratchet").iterdir())  # the token is gone


@pytest.mark.parametrize(("state", "ends", "code"), [("COMPLETING", "", 143), ("RUNNING", "2", 2), ("RUNNING", "1", 1)])
def test_a_job_that_was_cancelled_or_failed_is_not_queued_again(start, tmp_path, state, ends, code):
    process = start(state, ends)
    if not ends:
        assert stop(process, tmp_path) == code
    process.communicate(timeout=60)
    assert process.returncode == code
    assert not [line for line in log(tmp_path) if line.startswith("scontrol")]


@pytest.mark.parametrize(
    ("made", "restarts", "stopped", "again"),
    [
        ("journal/note-000001-000.json", "2", "143", True),
        ("journal/note-000001-000.json", "3", "143", False),  # the fourth start without a step
        ("journal/step-000001.arrow", "9", "143", True),
        ("journal/step-000001.arrow", "9", "1", True),  # a library's fault while it stopped
        ("journal/step-000001.arrow", "0", "2", False),
        ("journal/step-000001.arrow", "0", "0", False),
    ],
)
def test_a_stopped_run_is_queued_again_while_it_advances(start, tmp_path, made, restarts, stopped, again):
    process = start(MADE=str(tmp_path / "run" / made), SLURM_RESTART_COUNT=restarts, STOPPED=stopped)
    assert stop(process, tmp_path) == int(stopped)
    assert ("scontrol requeue 71234" in log(tmp_path)) == again


def test_the_heads_address_can_be_named_and_is_never_its_loopback(start, tmp_path):
    assert stop(start(RATCHET_HEAD_IP="10.7.7.7"), tmp_path) == 143
    assert [line for line in log(tmp_path) if "--node-ip-address=10.7.7.7 --port=21234" in line]
    process = start(ADDRESSES="127.0.1.1")
    process.communicate(timeout=60)
    assert (process.returncode, log(tmp_path)) == (1, [])


def test_slurm_is_asked_for_the_signal_and_for_a_second_start():
    options = re.findall(r"^#SBATCH (\S+)$", SCRIPT.read_text(), re.MULTILINE)
    assert {"--signal=B:TERM@300", "--requeue", "--open-mode=append"} <= set(options)


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed (the extra dev has it)")
@pytest.mark.parametrize("script", [SCRIPT, SCRIPT.parent.parent / "docker" / "health.sh"], ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    done = subprocess.run([SHELLCHECK, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
