"""Sinks get every row of a run once and in order, and a sink that fails or hangs never stops the run."""

from __future__ import annotations

import json
import math
import threading
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from common.config.base import LoggingConfig
from common.errors import UserError
from common.files import append_record
from deploy.sinks import following as module
from deploy.sinks.following import check_sinks, following
from deploy.sinks.rows import NewRows, Row
from tests.prometheus import wait_for


def step(number: int, **values: object) -> dict[str, object]:
    return {"step": number, "time": 100.0 + number, "kl/coef": number / 10, **values}


def evaluation(version: int) -> dict[str, object]:
    return {
        "time": 50.0 + version,
        "journal": "abc",
        "policy_version": version,
        "voids": 0,
        "void_reason": "",
        "score": 0.5,
        "pass_at_1": None,
        "interval": [0.1, 0.2],
        "components": {"exact": 0.25},
        "judge_voids": {"gold": 3},
    }


class Kept:
    """A sink that keeps its rows."""

    shown_at = "nowhere"

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.closed = False

    def write(self, row: Row) -> None:
        self.rows.append(row)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def follow(tmp_path, monkeypatch):
    """Follows a run directory with these classes in place of TensorBoard's and W&B's sinks."""

    def follow(tensorboard, wandb=Kept):
        monkeypatch.setattr(module, "TensorBoardSink", lambda directory: tensorboard())
        monkeypatch.setattr(module, "WandbSink", lambda directory, settings: wandb())
        cfg = LoggingConfig(sinks=("tensorboard", "wandb"))
        told, reports = [], []
        return following(cfg, tmp_path, cfg, tell=told.append, report=reports.append), told, reports

    return follow


def test_a_sink_gets_every_row_once_in_the_order_of_the_run(follow, tmp_path):
    append_record(tmp_path / "evaluations.jsonl", evaluation(0))
    append_record(tmp_path / "metrics.jsonl", step(0))
    kept = Kept()
    context, told, reports = follow(lambda: kept)
    with context as wake:
        append_record(tmp_path / "metrics.jsonl", step(1, health=["kl_exploding"]))
        wake()
        assert wait_for(lambda: len(kept.rows) == 3)
        append_record(tmp_path / "metrics.jsonl", step(2))
        append_record(tmp_path / "evaluations.jsonl", {**evaluation(3), "health": ["judge_falls"]})
        wake()
    assert [(row.place, row.step, row.time) for row in kept.rows] == [
        (0, 0, 50.0), (1, 0, 100.0), (3, 1, 101.0), (5, 2, 102.0), (6, 3, 53.0)
    ]  # fmt: skip
    assert kept.rows[2].values == {"kl/coef": 0.1, "health/kl_exploding": 1.0}
    evaluated = {"evaluation/voids": 0, "evaluation/score": 0.5, "evaluation/components/exact": 0.25}
    evaluated["evaluation/judge_voids/gold"] = 3
    assert kept.rows[0].values == evaluated
    assert kept.rows[4].values == {**evaluated, "health/judge_falls": 1.0}
    assert kept.closed
    assert (sorted(told), reports) == (["tensorboard: nowhere", "wandb: nowhere"], [])


def test_a_half_written_line_is_read_once_it_is_whole(tmp_path):
    rows, path = module.NewRows(tmp_path), tmp_path / "metrics.jsonl"
    line = json.dumps(step(0)) + "\n"
    path.write_text(line + line[:20])
    assert [row.step for row in rows.read()] == [0]
    path.write_text(line + json.dumps(step(1)) + "\nno JSON\n")
    assert [row.step for row in rows.read()] == [1]
    assert rows.read() == []


def test_a_sink_that_fails_is_reported_once_and_the_others_continue(follow, tmp_path):
    class Fails(Kept):
        def write(self, row: Row) -> None:
            raise OSError("no space left\nand more")

    kept = Kept()
    context, _, reports = follow(Fails, lambda: kept)
    with context as wake:
        for number in range(3):
            append_record(tmp_path / "metrics.jsonl", step(number))
            wake()
            assert wait_for(lambda number=number: len(kept.rows) == number + 1)
    assert [row.step for row in kept.rows] == [0, 1, 2]
    [report] = reports
    assert report.startswith("tensorboard (logging.sinks) failed and gets no more records (OSError: no space left); ")


def test_a_sink_that_hangs_holds_up_neither_the_run_nor_its_end(follow, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CLOSE_S", 0.2)
    hanging = threading.Event()
    kept = Kept()
    context, _, reports = follow(lambda: hanging.wait(60), lambda: kept)
    with context as wake:
        append_record(tmp_path / "metrics.jsonl", step(0))
        wake()
        assert wait_for(lambda: kept.rows)
    hanging.set()  # it continues, and fails then: it opened no sink
    assert wait_for(lambda: not any(thread.name == "sink tensorboard" for thread in threading.enumerate()))
    assert reports == ["tensorboard (logging.sinks) has not taken all records after 0.2 s; not waiting"]


def test_sinks_open_with_the_first_record_and_not_before(follow):
    opened: list[Path] = []
    context, told, _ = follow(lambda: opened.append(Path()))
    with context:
        pass
    assert (opened, told) == ([], [])


@pytest.mark.parametrize("found", [None, ModuleSpec("wandb", None)], ids=["nothing", "a directory named wandb"])
def test_a_sink_whose_package_is_missing_is_refused(monkeypatch, found):
    check_sinks(LoggingConfig(sinks=("tensorboard",)))
    monkeypatch.setattr("common.optional_packages.find_spec", lambda name: found)
    with pytest.raises(UserError, match=r"logging\.sinks names wandb, which is not installed; call pip install wandb"):
        check_sinks(LoggingConfig(sinks=("wandb",)))


def test_a_sink_cannot_be_named_twice():
    with pytest.raises(ValueError, match=r"sinks \(wandb, wandb\) names wandb twice"):
        LoggingConfig(sinks=("wandb", "wandb"))


def test_numbers_that_no_float_can_hold_are_infinite_and_steps_of_this_size_are_left_out(tmp_path):
    large = 10**400
    for record in (step(0, **{"kl/per_response": large}), step(1) | {"step": large}, step(2) | {"time": "now"}):
        append_record(tmp_path / "metrics.jsonl", record)
    for record in (evaluation(0) | {"score": large}, evaluation(1) | {"policy_version": large}):
        append_record(tmp_path / "evaluations.jsonl", record)
    rows = NewRows(tmp_path).read()
    assert [row.place for row in rows] == [0, 1]
    assert rows[0].values["evaluation/score"] == rows[1].values["kl/per_response"] == math.inf
