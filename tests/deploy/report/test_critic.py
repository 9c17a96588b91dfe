"""The critic tab's data: lines from the records, predicted against realised returns from the credit files."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.credit_table import FLOATS
from common.files import append_record
from deploy.report import critic
from deploy.report.critic import critic_of
from deploy.report.curves import curves_of
from deploy.report.report import page_blocks
from deploy.report.run_files import RunFiles
from deploy.report.steps import StepFiles
from tests.critic_figures import PARTS, split
from tests.deploy.report.made_run import write_run


def tab(directory):
    return critic_of(RunFiles.read(directory), StepFiles(directory))


def pairs(directory, step, gamma):
    """Value and realised return of each token of a step, from their definition."""
    found = []
    for row in pq.read_table(directory / f"credit/step-{step:06d}.parquet").to_pylist():
        for t, value in enumerate(row["values"]):
            found.append((value, sum(gamma**n * reward for n, reward in enumerate(row["rewards"][t:]))))
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Six steps; gamma 0.9. Step 2 has no credit file, that of step 3 is damaged."""
    run = write_run(tmp_path_factory.mktemp("runs") / "run")
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace("gamma = 1.0", "gamma = 0.9"))
    assert RunFiles.read(run).setting("ppo.gamma") == 0.9
    (run / "credit/step-000002.parquet").unlink()
    (run / "credit/step-000003.parquet").write_bytes(b"cut")
    return run


def test_calibration_follows_from_the_credit_files(run):
    found = tab(run)["calibrations"]
    assert [one["steps"] for one in found] == [[0, 5], [5, 5], [4, 4], [1, 1], [0, 0]]
    for one, steps in zip(found, [(0, 1, 4, 5), (5,), (4,), (1,), (0,)], strict=True):
        tokens = sorted(pair for step in steps for pair in pairs(run, step, 0.9))
        expected = [[*np.mean(part, axis=0), len(part)] for part in split(tokens, 10)]
        assert one["bins"] == [pytest.approx(bin, rel=1e-4, abs=1e-6) for bin in expected]
        assert one["error"] == pytest.approx(sum(n * abs(p - r) for p, r, n in expected) / len(tokens), rel=1e-4)
        assert one["deviation"] == pytest.approx(np.std([realised for _, realised in tokens]), rel=1e-4)


def test_lines_are_those_of_the_records(run):
    found = tab(run)
    assert found["steps"] == [0, 1, 2, 3, 4, 5]
    assert tuple(found["explained"]) == PARTS
    assert found["explained"]["first"] == pytest.approx([0.1 * step - 0.05 for step in range(6)])
    assert found["variance"] == [1, 1, 1, 0.2, 0.2, 0.2]
    assert found["enough"] == 0.25  # a quarter of the median of the first five
    assert found["left"] == 0.2


def test_of_many_steps_the_newest_and_some_others_are_offered(run, monkeypatch):
    monkeypatch.setattr(critic, "MAX_CALIBRATIONS", 2)
    monkeypatch.setattr(critic, "NEWEST", 2)
    found = tab(run)["calibrations"]  # files of 0, 1, 3, 4, 5: every third, and the newest two
    assert [one["steps"] for one in found] == [[4, 5], [5, 5], [4, 4], [0, 0]]


def test_steps_that_are_shown_together_are_bounded_by_their_tokens(run, monkeypatch):
    monkeypatch.setattr(critic, "MAX_TOKENS", len(pairs(run, 5, 1)) + len(pairs(run, 4, 1)))
    assert tab(run)["calibrations"][0]["steps"] == [4, 5]


def test_a_run_without_credit_files_has_its_lines(tmp_path):
    found = tab(write_run(tmp_path / "run", credit=False))
    assert len(found["steps"]) == 6
    assert found["calibrations"] == []


def passes_of(*explained):
    """Evaluations of `ratchet train-critic` after 0, 10, 20, ... steps."""
    figures = [{f"value/explained_variance/{part}": value for part in PARTS} for value in explained]
    return [
        {
            **{
                "step": 10 * number,
                "epoch": float(number),
                "rollouts": 8,
                "tokens": 40,
                "loss": 1 - found,
                "time": 1.0,
            },
            **{"value/returns_var/realised": 1.5, "value/calibration_error": 0.1, **figures[number]},
        }
        for number, found in enumerate(explained)
    ]


@pytest.fixture(scope="module")
def critic_run(tmp_path_factory):
    """A directory of `ratchet train-critic`: 20 steps in two passes."""
    run = write_run(tmp_path_factory.mktemp("runs") / "critic", steps=1, credit=False)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (run / name).unlink()
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**about, "command": "train-critic"}))
    for step in range(20):
        record = {"step": step, "time": 1.0, "epoch": step / 10, "value/loss": 1.0, "critic/grad_norm": 2.0}
        append_record(run / "metrics.jsonl", {**record, "value/explained_variance/realised": 0.02 * step})
    for record in passes_of(0.0, 0.4, 0.3):
        append_record(run / "evaluations.jsonl", record)
    return run


def test_a_critic_that_is_trained_alone_has_its_evaluations(critic_run):
    found = tab(critic_run)
    assert found["steps"] == [0, 10, 20]
    assert found["explained"]["quarter_2"] == [0, 0.4, 0.3]
    assert found["variance"] == [1.5] * 3
    assert found["enough"] == 0.0
    curves = {curve["key"]: curve for group in curves_of(RunFiles.read(critic_run)) for curve in group["curves"]}
    assert len(curves["critic/grad_norm"]["y"]) == len(curves["value/loss"]["y"]) == 20
    assert curves["value/loss"]["heldout"] == {"x": [0, 10, 20], "y": [1.0, 0.6, 0.7]}
    assert curves["value/explained_variance/realised"]["heldout"]["y"] == [0, 0.4, 0.3]
    assert curves["value/calibration_error"]["heldout"]["y"] == [0.1] * 3
    assert curves["value/calibration_error"]["meaning"]
    assert set(curves).isdisjoint({"epoch", "loss", "tokens", "rollouts"})


def test_the_page_of_a_critic_that_is_trained_alone(critic_run):
    blocks = page_blocks(RunFiles.read(critic_run))
    assert blocks["run"]["state"] == "finished"
    assert blocks["run"]["is_critic"]
    assert blocks["run"]["num_steps"] is None  # of PPO
    assert blocks["events"] == [e for e in blocks["events"] if e["kind"] == "died"]


def test_a_run_without_a_critic_has_nothing(tmp_path):
    run = write_run(tmp_path / "run", steps=2)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    without = [{key: x for key, x in record.items() if not key.startswith("value/")} for record in records]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in without))
    for path in (run / "credit").glob("*.parquet"):
        table = pq.read_table(path)
        index = table.schema.get_field_index("values")
        pq.write_table(table.set_column(index, "values", pa.nulls(table.num_rows, FLOATS)), path)
    found = tab(run)
    assert found["steps"] == found["calibrations"] == []
    assert found["left"] is None
