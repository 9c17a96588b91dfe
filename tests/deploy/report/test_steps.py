"""Reading the journal and the credit files: what is missing, damaged or null costs only itself."""

import numpy as np
import pyarrow as pa
import pytest

from common.errors import UserError
from deploy.report.report import page_blocks
from deploy.report.run_files import RunFiles
from deploy.report.steps import StepFiles, lists
from deploy.run.directory import sole_owner
from tests.deploy.report.made_run import write_run


def test_null_rows_of_a_column_are_absent():
    table = pa.table({"ratio": pa.array([[1.0, 2.0], None, [3.0]], pa.list_(pa.float32()))})
    found = lists(table, "ratio")
    assert found.row(0).tolist() == [1.0, 2.0]
    assert found.row(1) is None
    assert found.row(2).tolist() == [3.0]
    assert found.sums().tolist() == [3.0, 0.0, 3.0]


def test_a_column_of_nulls_is_absent():
    table = pa.table({"values": pa.nulls(2, pa.list_(pa.float32()))})
    assert lists(table, "values") is None
    assert lists(table, "td_errors") is None
    assert lists(None, "values") is None


def test_rows_of_a_slice_keep_their_own_items():
    whole = pa.table({"kl": pa.array([[9.0], [1.0, 2.0], [], [4.0]], pa.list_(pa.float32()))})
    found = lists(whole.slice(1), "kl")
    assert [found.row(i).tolist() for i in range(3)] == [[1.0, 2.0], [], [4.0]]
    assert found.sums().tolist() == [3.0, 0.0, 4.0]


def test_one_number_that_is_not_finite_does_not_reach_other_rows():
    table = pa.table({"kl": pa.array([[1.0, float("nan")], [2.0, float("inf")], [3.0]], pa.list_(pa.float32()))})
    assert lists(table, "kl").sums().tolist() == [1.0, 2.0, 3.0]


def test_damaged_and_foreign_files_are_left_out(tmp_path):
    run = write_run(tmp_path / "run", steps=4)
    (run / "journal/step-000001.arrow").write_bytes(b"cut")
    (run / "credit/step-000002.parquet").write_bytes(b"cut")
    foreign = (run / "credit/step-000003.parquet").read_bytes()
    (run / "credit/step-000000.parquet").write_bytes(foreign)  # derived from the journal file of step 3
    files = StepFiles(run)
    steps = list(files.each(files.numbers()))
    assert [step.number for step in steps] == [0, 2, 3]
    assert [files.credit(step) is not None for step in steps] == [False, False, True]
    assert files.unreadable == ["journal/step-000001.arrow", "credit/step-000002.parquet"]


def test_a_run_that_goes_on_may_lack_its_last_files(tmp_path):
    run = write_run(tmp_path / "run", steps=3, finished=False)
    (run / "credit/step-000002.parquet").unlink()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "time"')
    files = StepFiles(run)
    assert [files.credit(step) is None for step in files.each(files.numbers())] == [False, False, True]
    assert files.unreadable == []
    assert [record["step"] for record in RunFiles.read(run).metrics] == [0, 1, 2]


def test_a_run_is_running_while_a_process_owns_its_directory(tmp_path):
    run = write_run(tmp_path / "run", steps=1, finished=False)
    with sole_owner(run, make=False):
        assert RunFiles.read(run).running
    assert not RunFiles.read(run).running


def test_a_replayed_step_is_shown_once_by_its_newest_record(tmp_path):
    run = write_run(tmp_path / "run", steps=2)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "time": 1, "rollout/score/mean": 7}\n')
    assert [r["rollout/score/mean"] for r in RunFiles.read(run).metrics if r["step"] == 1] == [7]


def test_records_of_another_kind_are_left_out(tmp_path):
    run = write_run(tmp_path / "run", steps=2)
    odd = {
        "metrics.jsonl": ['{"step": "x", "time": 1}', '{"step": 9, "time": {}}', '{"time": 3}', "[1]"],
        "evaluations.jsonl": ['{"policy_version": []}', '{"policy_version": 1, "score": "<b>"}'],
        "pool-events.jsonl": ['{"time": null, "event": "died"}', '{"time": 1, "event": []}'],
    }
    before = RunFiles.read(run)
    for name, lines in odd.items():
        with open(run / name, "a") as file:
            file.write("\n".join(lines) + "\n")
    with open(run / "evaluations.jsonl", "a") as file:
        file.write('{"policy_version": 3, "score": 1, "interval": "x", "components": true}\n')
    after = RunFiles.read(run)
    assert after.metrics == before.metrics
    assert after.pool_events == before.pool_events
    assert after.evaluations == [*before.evaluations, {"policy_version": 3, "score": 1}]
    (run / "run.json").write_text('{"ratchet_run": 1, "command": "train", "starts": 7}')
    (run / "journal/note-000002-000.json").write_text('{"kind": "void", "step": [1]}')
    assert page_blocks(RunFiles.read(run))["run"]["started"] is None


@pytest.mark.parametrize(("name", "says"), [("none", "not a directory"), ("", "must be the directory of a run")])
def test_other_directories_are_refused(tmp_path, name, says):
    with pytest.raises(UserError, match=says):
        RunFiles.read(tmp_path / name)


def test_settings_are_found_by_their_path(tmp_path):
    run = RunFiles.read(write_run(tmp_path / "run", steps=1))
    assert run.setting("ppo.clip_eps") == 0.2
    assert run.setting("ppo.no_such", 5) == 5
    assert np.isclose(run.setting("ppo.gamma"), 1)
