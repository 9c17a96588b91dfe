"""TensorBoard's own reader finds the rows of a run in its event files."""

from __future__ import annotations

import subprocess
import sys

import pytest

from deploy.sinks.rows import Row
from deploy.sinks.tensorboard_sink import TensorBoardSink
from tests.event_files import points

pytest.importorskip("tensorboard")


def write(directory, rows, close=True):
    sink = TensorBoardSink(directory)
    for row in rows:
        sink.write(row)
    if close:
        sink.close()


ROWS = [
    Row(0, 0, 99.0, {"evaluation/score": 0.5}),
    Row(1, 0, 100.0, {"kl/coef": 0.25, "ppo/ratio": 1.0}),
    Row(3, 1, 101.0, {"kl/coef": 0.5, "health/kl_exploding": 1.0}),
]
FOUND = {
    "evaluation/score": [(0, 99.0, 0.5)],
    "kl/coef": [(0, 100.0, 0.25), (1, 101.0, 0.5)],
    "ppo/ratio": [(0, 100.0, 1.0)],
    "health/kl_exploding": [(1, 101.0, 1.0)],
}


def test_tensorboard_reads_every_row_while_the_run_goes_on(tmp_path):
    write(tmp_path, ROWS, close=False)
    assert points(tmp_path) == FOUND


def test_a_resumed_run_has_every_step_once(tmp_path):
    write(tmp_path, [*ROWS[:2], Row(3, 1, 101.0, {"kl/coef": 9.0})], close=False)  # of a step that was lost
    write(tmp_path, ROWS)
    assert points(tmp_path) == FOUND


def test_the_sinks_load_no_torch(tmp_path):
    pytest.importorskip("wandb")
    code = (
        "import pathlib, sys, wandb; from deploy.sinks.following import TensorBoardSink; "
        "TensorBoardSink(pathlib.Path(sys.argv[1])).close(); "
        "print({'torch', 'tensorflow', 'ray', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("set()\n", 0), done.stderr
