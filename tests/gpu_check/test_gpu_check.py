"""The checks for GPUs run on a CPU as far as they can, and report what goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu_check import engine
from tests.gpu_check.__main__ import CHECKS, main
from tests.gpu_check.run import Run
from tests.test_layers import imports_without
from tests.tracing import trace_only


@pytest.fixture(autouse=True)
def _environment_and_threads(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    trace_only(monkeypatch)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_checks_that_a_cpu_can_run_pass_there(capsys):
    assert main(["--device", "cpu", "--only", ",".join(set(CHECKS) - {"engine"})]) == 0
    kinds = [line[:4] for line in capsys.readouterr().out.splitlines()]
    assert kinds.count("PASS") >= 35
    assert kinds.count("FAIL") == 0
    assert kinds.count("SKIP") >= 6


@pytest.mark.ray  # it imports vLLM
def test_the_check_of_the_engine_passes_on_a_cpu(tmp_path, capsys):
    run = Run(torch.device("cpu"), tmp_path)
    run.part("engine, sampling", engine.check_sampling)
    assert run.failures == []
    said = capsys.readouterr().out
    assert said.count("PASS") == 3
    assert "answers are the same alone and in a batch" in said


def test_an_unknown_check_is_refused_with_those_that_exist(capsys):
    with pytest.raises(SystemExit):
        main(["--device", "cpu", "--only", "attention,nothing"])
    assert "no such check: nothing; there are attention, head" in capsys.readouterr().err


def test_an_error_fails_its_part_and_the_next_part_runs(tmp_path, capsys):
    run, done = Run(torch.device("cpu"), tmp_path), []

    def fail(run: Run, text: str) -> None:
        raise ValueError(text)

    run.part("first", fail, "broken")
    run.part("second", lambda run: done.append(1))
    assert (run.failures, done) == (["first: ValueError: broken"], [1])
    assert capsys.readouterr().out == "FAIL first: ValueError: broken\n"


def test_a_part_that_begins_too_late_is_skipped(tmp_path, capsys):
    run, done = Run(torch.device("cpu"), tmp_path, limit_s=0), []
    run.part("late", lambda run: done.append(1))
    assert (run.failures, done) == ([], [])
    assert capsys.readouterr().out == "SKIP late: the 0 s of --limit-s are over\n"


def test_a_wrong_value_fails_the_run(monkeypatch, capsys):
    monkeypatch.setitem(CHECKS, "head", lambda run: run.expect(False, "off by 1"))
    assert main(["--device", "cpu", "--only", "head"]) == 1
    assert "FAIL off by 1\n" in capsys.readouterr().out


def test_the_checks_import_neither_ray_nor_vllm():
    done = imports_without("ray,vllm", [Path("tests/gpu_check/__main__.py")])
    assert done.returncode == 0, done.stderr[-2000:]
