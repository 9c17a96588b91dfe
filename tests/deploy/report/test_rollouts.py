"""The table of rollouts and the token numbers of the page, against the files of the run."""

import base64
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy.report.rollouts import Rollouts
from deploy.report.steps import StepFiles
from deploy.report.token_text import TokenText
from tests.deploy.report.made_run import write_run
from tests.fakes import WORDS


def tables_of(run, **limits):
    rollouts = Rollouts(StepFiles(run), TokenText.of_run(run, "none"))
    rollouts.read()
    return rollouts.page(**limits)


def journal_rows(run):
    return [
        r for p in sorted((run / "journal").glob("*.arrow")) for r in pa.ipc.open_file(str(p)).read_all().to_pylist()
    ]


def credit_rows(run):
    return [row for path in sorted((run / "credit").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def numbers(packed, length):
    """The numbers that the page's unpack() gives."""
    if isinstance(packed, int | float):
        return np.full(length, packed)
    return np.frombuffer(base64.b64decode(packed), "<f2").astype(float)


def test_rows_have_the_numbers_of_journal_and_credit(run_directory):
    table, _ = tables_of(run_directory)
    learned = [i for i, void in enumerate(table["void"]["rows"]) if void < 0]
    journal, credit = journal_rows(run_directory), credit_rows(run_directory)
    assert len(learned) == len(journal) == 48
    for i, row, derived in zip(learned, journal, credit, strict=True):
        assert table["id"][i] == f"{row['epoch']}/{row['prompt_index']}/{row['replica']}" == derived["sample_id"]
        assert table["score"][i] == pytest.approx(row["score"], rel=1e-4)
        assert table["components"]["a_words"][i] == pytest.approx(dict(row["components"])["a_words"], rel=1e-4)
        assert table["tokens"][i] == len(row["response_ids"])
        assert table["finish"][i] == row["finish_reason"]
        assert table["kl"][i] == pytest.approx(sum(derived["kl"]), rel=1e-4, abs=1e-5)
        assert table["clipped"][i] == pytest.approx(sum(derived["clipped"]) / len(derived["clipped"]), rel=1e-4)
        assert table["staleness"][i] == 0


def test_every_token_has_the_numbers_of_its_files(run_directory):
    table, details = tables_of(run_directory)
    learned = [i for i, void in enumerate(table["void"]["rows"]) if void < 0]
    both = zip(learned, journal_rows(run_directory), credit_rows(run_directory), strict=True)
    for i, row, derived in both:
        detail, length = details["rows"][i], len(row["response_ids"])
        assert [details["pieces"][p].strip() for p in detail["tokens"]] == [WORDS[t] for t in row["response_ids"]]
        for name in ("values", "kl", "rewards", "td_errors", "advantages", "returns", "entropy", "ratio", "clipped"):
            assert numbers(detail[name], length) == pytest.approx(np.array(derived[name], float), rel=1e-3, abs=1e-6), (
                name
            )
        assert numbers(detail["ref_logprobs"], length) == pytest.approx(row["ref_logprobs"], rel=1e-3)
        assert detail["policy_versions"] == row["step"]
        assert details["prompts"][str(row["prompt_index"])] == row["prompt"]


def test_voids_have_reason_and_text_but_no_score(run_directory):
    table, details = tables_of(run_directory)
    voids = [i for i, reason in enumerate(table["void"]["rows"]) if reason >= 0]
    assert [table["step"][i] for i in voids] == [1, 1]
    assert [table["score"][i] for i in voids] == [None, None]
    reasons = [table["void"]["texts"][table["void"]["rows"][i]] for i in voids]
    assert reasons[1] == "timeout"
    assert details["rows"][voids[0]]["text"].startswith("</script>")
    assert details["rows"][voids[1]] == {"text": ""}


def test_rollouts_of_a_void_batch_are_void(tmp_path):
    run = write_run(tmp_path / "run", steps=3)
    note = {"kind": "void", "step": 1, "reason": "loss is not finite", "sample_ids": []}
    (run / "journal/note-000002-000.json").write_text(json.dumps(note))
    table, _ = tables_of(run)
    void = [table["step"][i] for i, reason in enumerate(table["void"]["rows"]) if reason >= 0]
    assert void == [1] * 8
    assert table["void"]["texts"] == ["loss is not finite"]


def test_without_credit_files_the_journal_gives_kl(tmp_path):
    run = write_run(tmp_path / "run", steps=2, credit=False)
    table, details = tables_of(run)
    for i, row in enumerate(journal_rows(run)):
        kl = sum(a - b for a, b in zip(row["rollout_logprobs"], row["ref_logprobs"], strict=True))
        assert table["kl"][i] == pytest.approx(kl, rel=1e-3, abs=1e-4)
        assert table["clipped"][i] is None
        assert set(details["rows"][i]) == {"tokens", "rollout_logprobs", "ref_logprobs", "policy_versions"}


def test_a_small_budget_bounds_the_details(tmp_path):
    run = write_run(tmp_path / "run", steps=30, tokens=(20, 40))
    table, details = tables_of(run, budget=60_000)
    everything, _ = tables_of(run)[1], None
    assert len(json.dumps(details)) < 75_000 < len(json.dumps(everything))
    run_has, in_table, detailed = table["kept"]["all"]
    assert run_has == in_table == 240 == len(table["id"])
    assert detailed == len(details["rows"]) < 240
    assert table["kept"]["extreme"][1] == table["kept"]["extreme"][0]


def test_tokens_are_numbers_if_the_run_kept_no_tokenizer(tmp_path):
    run = write_run(tmp_path / "run", steps=1)
    (run / "tokenizer.json").unlink()
    _, details = tables_of(run)
    ids = journal_rows(run)[0]["response_ids"]
    assert [details["pieces"][p] for p in details["rows"][0]["tokens"]] == [f"[{i}]" for i in ids]
