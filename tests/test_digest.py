"""The digest of a run changes with every number that was learned from, and with no clock."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.metrics.table import STEP
from learner.loop.train_loop import train
from tests.digest import UNREPEATABLE_KEYS, UNREPEATABLE_PATHS, digests
from tests.fakes import FakeRoles
from tests.learner.loop.test_train_loop import make_run


def make_small_run(directory: Path, **overrides) -> Path:
    asyncio.run(train(make_run(directory, FakeRoles([]), num_steps=2, **overrides)))
    (directory / "policy").mkdir(exist_ok=True)
    save_file({"a": torch.ones(2), "b": torch.tensor([1.5], dtype=torch.bfloat16)}, directory / "policy/w.safetensors")
    return directory


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_small_run(tmp_path_factory.mktemp("digest") / "run")


@pytest.fixture
def copied(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def change_record(path: Path, **changes) -> None:
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(first), **changes}), *rest]) + "\n", encoding="utf-8")


def parting(one: Path, other: Path) -> str | None:
    """The first part in which two runs differ."""
    return next((name for (name, a), (_, b) in zip(digests(one), digests(other), strict=True) if a != b), None)


def test_two_runs_of_one_seed_have_one_digest(run, tmp_path):
    again = make_small_run(tmp_path / "again")
    assert parting(run, again) is None
    assert [name for name, _ in digests(run)] == ["step 0", "step 1", "curve", "evaluations", "policy"]


def test_another_seed_differs_from_its_first_step(run, tmp_path):
    assert parting(run, make_small_run(tmp_path / "other", seed=1)) == "step 0"


@pytest.mark.parametrize(
    ("file", "changes", "part"),
    [
        ("metrics.jsonl", {"time": 0.0, "time/learn_s": 9.0, "staleness/buffered_s": 9.0, "weights/bytes": 9}, None),
        ("metrics.jsonl", {"rollout/score/mean": 0.123}, "curve"),
        ("evaluations.jsonl", {"time": 0.0}, None),
        ("evaluations.jsonl", {"score": 0.123}, "evaluations"),
    ],
)
def test_a_record_counts_but_for_its_times(run, copied, file, changes, part):
    change_record(copied / file, **changes)
    assert parting(run, copied) == part


def test_one_changed_weight_changes_the_digest(run, copied):
    file = copied / "policy/w.safetensors"
    weights = load_file(file)
    weights["a"][1] = 1.0000001
    save_file(weights, file)
    assert parting(run, copied) == "policy"


def test_the_number_of_weight_files_does_not_matter(run, copied):
    weights = load_file(copied / "policy/w.safetensors")
    (copied / "policy/w.safetensors").unlink()
    for name, tensor in weights.items():
        save_file({name: tensor}, copied / f"policy/{name}.safetensors")
    assert parting(run, copied) is None


def test_every_metric_measured_in_seconds_is_left_out():
    seconds = {metric.key for metric in STEP if metric.unit.startswith("seconds")}
    left_out = {f.key for f in STEP if f.key in UNREPEATABLE_KEYS or f.key.startswith(UNREPEATABLE_PATHS)}
    assert left_out == seconds | {"weights/bytes"}


def test_the_command_prints_one_line_for_each_part(run, tmp_path):
    command = [sys.executable, "-m", "tests.digest"]
    printed = subprocess.run([*command, str(run)], capture_output=True, text=True, check=True).stdout
    assert printed == "".join(f"{digest}  {name}\n" for name, digest in digests(run))
    refused = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert refused.returncode != 0
    assert "usage" in refused.stderr
