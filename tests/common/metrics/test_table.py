"""The table of metrics: the docs agree with it, names are unique, and keys shared by two tables mean the same."""

from __future__ import annotations

from collections import Counter

import pytest

from common.metrics.table import CRITIC_STEP, ENDPOINT, METERS, REDUCERS, REWARD_STEP, STEP
from tests.metrics_tables import PAGE, written

RECORDS = (STEP, REWARD_STEP, CRITIC_STEP)


def test_the_tables_in_the_docs_are_those_of_the_code():
    page = PAGE.read_text(encoding="utf-8")
    assert page == written(page), "write them again: python -m tests.metrics_tables"


def test_the_docs_have_a_row_for_every_metric():
    # Other sections have tables of other things.
    tables = [part.partition("\n## ")[0] for part in PAGE.read_text(encoding="utf-8").split("<!-- table: ")[1:]]
    lines = [line for table in tables for line in table.splitlines()]
    rows = Counter(line.split("`")[1] for line in lines if line.startswith("| `"))
    keys = Counter(metric.key for table in RECORDS for metric in table) + Counter(f"ray_{name}" for name in METERS)
    assert rows == keys
    assert "| `kl/coef` | reward per nat | last | | changes only with the adaptive controller |" in lines
    assert any(line.startswith("| `ppo/grad_norm` | - | max over optimizer steps | |") for line in lines)
    assert any(
        line.startswith("| `value/returns_var` | reward units squared | variance over tokens |") for line in lines
    )


def test_a_row_that_was_changed_by_hand_is_written_again():
    page = PAGE.read_text(encoding="utf-8")
    assert written(page.replace("`ray_ratchet_batch_tokens`", "`ray_ratchet_batch_words`")) == page


def test_a_page_without_a_place_for_a_table_is_refused():
    page = PAGE.read_text(encoding="utf-8").replace("table: process", "table: other")
    with pytest.raises(ValueError, match="process"):
        written(page)


def test_no_two_metrics_share_a_name_in_prometheus():
    names = [metric.prometheus for metric in (*STEP, *ENDPOINT)]
    assert len(set(names)) == len(names)
    assert names[2] == "ratchet_rollout_score_mean"


def test_no_two_metrics_share_a_heading_on_the_screen():
    for table in RECORDS:
        headings = [metric.screen for metric in table if metric.screen]
        assert len(set(headings)) == len(headings)


def test_a_key_of_several_tables_is_reduced_in_the_same_way():
    for table in RECORDS:
        for metric in table:
            assert REDUCERS[metric.key] == metric.reducer
