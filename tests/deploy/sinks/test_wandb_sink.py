"""A run in W&B's offline mode: rows, config, the table of samples, and a resumed run."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from common.files import read_records
from deploy.sinks.following import following
from deploy.sinks.rows import SAMPLE_COLUMNS
from deploy.sinks.wandb_sink import WandbSink
from learner.loop.journal import Journal
from learner.loop.run import Run
from learner.loop.train_loop import train
from tests.learner.loop.test_train_loop import make_run
from tests.prometheus import wait_for
from tests.test_docs import Writers
from tests.wandb_file import config, history

pytest.importorskip("wandb")


@pytest.fixture
def offline(monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    yield
    wandb.teardown()  # it remembers the variables of its first use


def follow(directory: Path, num_steps: int, reports: list[str]) -> Run:
    """Trains with fakes up to this step. The sink follows."""
    logging = {"sinks": ["wandb"], "samples": 3, "samples_every": 2}
    run = make_run(directory, Writers([]), num_steps=num_steps, logging=logging, evaluation={"prompts": 4})
    run.decode = lambda responses: [f"text {ids[0]}" for ids in responses]
    with following(run.cfg.logging, directory, run.cfg, tell=lambda text: None, report=reports.append) as wake:
        run.on_step = lambda *_: wake()
        run.on_evaluation = lambda *_: wake()
        asyncio.run(train(run))
    return run


def numbers(directory: Path) -> list[int]:
    return [row["_step"] for row in history(directory)]


@pytest.mark.parametrize("killed", [False, True])
def test_a_resumed_run_continues_its_wandb_run_without_a_row_twice(tmp_path, offline, killed):
    """Two starts; the second one trains two more steps. A killed process has not written all rows to W&B's log."""
    directory, reports = tmp_path / "RUN", []
    follow(directory, 2, reports)
    assert wait_for(lambda: numbers(directory) == [0, 1, 3, 4])  # W&B's own process writes the file
    if killed:
        [log] = directory.glob("wandb/offline-run-*/*.wandb")
        whole = log.read_bytes()
        for length in range(len(whole), 0, -50):
            log.write_bytes(whole[:length])
            if numbers(directory) == [0, 1]:
                break
    run = follow(directory, 4, reports)
    assert reports == []
    # offline-run-TIME-ID, or offline-run-TIME-ID-1 if it is the second one within a second
    assert len({path.name.split("-")[3] for path in directory.glob("wandb/offline-run-*")}) == 1
    assert wait_for(lambda: len(history(directory)) == 7)
    rows = history(directory)
    assert [row["_step"] for row in rows] == [0, 1, 3, 4, 5, 7, 8]
    records = {record["step"]: record for record in read_records(directory / "metrics.jsonl")}
    for number, row in zip((1, 3, 5, 7), (rows[1], rows[2], rows[4], rows[5]), strict=True):
        record = records[number // 2]
        assert row["step"] == record["step"]
        assert row["rollout/score/mean"] == pytest.approx(record["rollout/score/mean"])
    evaluations = read_records(directory / "evaluations.jsonl")
    assert [row["evaluation/score"] for row in (rows[0], rows[3], rows[6])] == [e["score"] for e in evaluations]
    assert config(directory)["kl"] == run.cfg.kl.model_dump()

    tables = [
        json.loads(path.read_text()) for path in sorted(directory.glob("wandb/offline-run-*/files/media/table/*.json"))
    ]
    assert ["samples/path" in row for row in rows] == [False, True, False, False, True, False, False]
    assert [table["columns"] for table in tables] == [list(SAMPLE_COLUMNS)] * 2
    for table, step in zip(tables, (0, 2), strict=True):
        journal = Journal(directory / "journal").read(step).table.slice(0, 3).to_pylist()
        wanted = [[step, *(row[k] for k in ("prompt", "response", "score"))] for row in journal]
        assert [row[:4] for row in table["data"]] == wanted
        assert [row[4:] for row in table["data"]] == [[len(r["response_ids"]), r["finish_reason"]] for r in journal]


def test_without_a_key_the_run_continues_and_nothing_is_asked(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(RuntimeError, match="no API key; call `wandb login`, set WANDB_API_KEY, or set WANDB_MODE="):
        WandbSink(tmp_path, make_run(tmp_path / "RUN", Writers([]), num_steps=1).cfg)
