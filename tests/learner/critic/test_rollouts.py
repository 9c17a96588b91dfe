"""The rollouts of journals: which are read, in which order they are given, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from common.errors import UserError
from common.experience_table import experience_table
from common.types import Turn
from learner.critic import rollouts
from learner.critic.rollouts import COLUMNS, ROW, JournalPart, Rollouts, choose_steps
from learner.loop.journal import Journal
from tests.fakes import as_episode
from tests.learner.critic.journals import rollout, step_table, write_journal

ALL = slice(None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two journals: of four steps, the second of which is void, and of two steps with other prompts."""
    directory = tmp_path_factory.mktemp("runs")
    write_journal(directory / "one", [step_table(step) for step in range(4)]).void(1, "made up")
    write_journal(directory / "two", [step_table(step, 1, prompts=20) for step in range(2)])
    return directory


@pytest.fixture(scope="module")
def both(runs):
    return Rollouts([choose_steps(runs / "one", ALL), choose_steps(runs / "two", slice(1, None))])


def test_every_rollout_that_is_not_void_is_given_once(both, runs):
    tables = [step_table(0), step_table(2), step_table(3), step_table(1, 1, prompts=20)]
    expected = pa.concat_tables(tables).select(COLUMNS)
    assert len(both) == 32
    assert both.table(np.arange(32)).drop_columns(ROW).equals(expected.combine_chunks())
    order = np.random.default_rng(0).integers(0, 32, 20)  # some twice
    found = both.table(order)
    assert found[ROW].to_pylist() == order.tolist()
    assert found.drop_columns(ROW).equals(expected.take(pa.array(order)).combine_chunks())
    parts = [(record["run"], record["first"], record["end"], record["void"]) for record in both.records()]
    assert parts == [(str(runs / "one"), 0, 4, (1,)), (str(runs / "two"), 1, 2, ())]
    assert [record["rollouts"] for record in both.records()] == [24, 8]
    assert both.records()[0]["digest"] == Journal(runs / "one/journal").digest(4)


def test_the_longest_prompt_with_its_response_is_known(both):
    table = both.table(np.arange(32)).to_pydict()
    pairs = zip(table["prompt_ids"], table["response_ids"], strict=True)
    assert both.longest == max(len(prompt) + len(response) for prompt, response in pairs)


def test_tokens_of_an_environment_count_for_memory_alone(tmp_path):
    rows = [as_episode(rollout(i, 0), *([Turn(1, 2, 1.0)] if i % 2 else ())) for i in range(8)]
    write_journal(tmp_path, [experience_table(rows)])
    found = Rollouts([choose_steps(tmp_path, ALL)])
    lengths = [len(row.rollout.response_ids) for row in rows]
    assert found.response_tokens.tolist() == [n - (i % 2 and n > 1) for i, n in enumerate(lengths)]
    assert found.longest == max(len(row.rollout.prompt.token_ids) + n for row, n in zip(rows, lengths, strict=True))
    assert found.table(np.arange(8))["turns"].to_pylist()[1][0]["next_start"] == 2


def test_the_moments_are_those_of_all_scores(both):
    scores = both.table(np.arange(32))["score"].to_numpy()
    assert both.moments.count == 32
    assert both.moments.mean == pytest.approx(scores.mean(), abs=1e-12)
    assert both.moments.deviation == pytest.approx(scores.std(), abs=1e-12)


def test_few_files_are_open_at_once(runs, monkeypatch):
    monkeypatch.setattr(rollouts, "_OPEN_FILES", 1)
    found = Rollouts([choose_steps(runs / "one", ALL)])
    assert found.table(np.array([20, 0, 9]))["score"].to_pylist() == [
        pa.concat_tables([step_table(0), step_table(2), step_table(3)])["score"][i].as_py() for i in (20, 0, 9)
    ]
    assert found._open.cache_info().currsize == 1


@pytest.mark.parametrize(("share", "held"), [(0.01, 1), (0.3, 5), (0.99, 15)])
def test_all_responses_to_a_prompt_are_on_one_side(both, share, held):
    train, heldout = both.split(share, seed=3)
    assert sorted([*train, *heldout]) == list(range(32))
    # The number of each row's prompt: 16 prompts, of which 8 to 11 are in both journals.
    prompts = [*range(8), *(row % 12 for row in range(16, 32)), *range(8, 16)]
    sides = [{prompts[row] for row in side} for side in (train, heldout)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == held
    again = both.split(share, seed=3)
    assert all(np.array_equal(one, other) for one, other in zip((train, heldout), again))
    assert not np.array_equal(heldout, both.split(share, seed=4)[1]) or share == 0.99


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (slice(2, 5), r"--steps 2:5 is not in the journal of .*one, which has 4 steps: 0:4"),
        (slice(4, None), r"--steps 4: is not in the journal of .*one, which has 4 steps"),
        (slice(3, 3), "--steps 3:3 is not in the journal"),
        (slice(1, 2), "every step of 1:2 is void"),
    ],
)
def test_steps_that_are_not_there_are_refused(runs, steps, message):
    with pytest.raises(UserError, match=message):
        choose_steps(runs / "one", steps)


def test_a_directory_without_a_journal_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no journal with steps"):
        choose_steps(tmp_path, ALL)


def test_a_journal_that_changed_since_is_refused(runs, tmp_path):
    shutil.copytree(runs / "two", tmp_path / "run")
    part = JournalPart.from_record({**vars(choose_steps(tmp_path / "run", ALL)), "rollouts": 16})
    journal = Journal(tmp_path / "run/journal")
    journal.append(step_table(2), policy_version=2, prompts={})
    assert len(Rollouts([part])) == 16  # later steps change nothing
    with pytest.raises(UserError, match=r"has changed since this training began: step 1 had SHA-256 [0-9a-f]{12}"):
        Rollouts([replace(part, digest="0" * 64)])
    with pytest.raises(UserError, match="has changed"):
        Rollouts([replace(part, end=9)])
    damaged = tmp_path / "run/journal/step-000000.arrow"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"step-000000.arrow is damaged"):
        Rollouts([part])


@pytest.mark.parametrize("column", ["score", "rollout_logprobs", "ref_logprobs"])
def test_a_step_with_numbers_that_are_not_finite_is_skipped(tmp_path, column):
    table = step_table(1)
    values = table[column].to_pylist()
    values[3] = float("nan") if column == "score" else [float("inf")] * len(values[3])
    place = table.column_names.index(column)
    table = table.set_column(place, table.field(place), pa.array(values, table.field(place).type))
    write_journal(tmp_path, [step_table(0), table, step_table(2)])
    found = Rollouts([choose_steps(tmp_path, ALL)])
    assert found.faults == [f"{tmp_path}/journal/step-000001.arrow has a {column} that is missing or not finite"]
    kept = pa.concat_tables([step_table(0), step_table(2)])["response_ids"].to_pylist()
    assert found.table(np.arange(16))["response_ids"].to_pylist() == kept
    [record] = found.records()
    assert (record["skipped"], record["rollouts"], record["end"]) == ([1], 16, 3)
    with pytest.raises(UserError, match="none of the chosen steps can be learned from"):
        Rollouts([choose_steps(tmp_path, slice(1, 2))])


def test_steps_without_a_rollout_are_refused(tmp_path):
    write_journal(tmp_path, [step_table(0).slice(0, 0)])
    with pytest.raises(UserError, match="no rollout in the chosen steps"):
        Rollouts([choose_steps(tmp_path, ALL)]).split(0.5, seed=0)


def test_a_single_prompt_is_refused(tmp_path):
    write_journal(tmp_path, [step_table(0, prompts=1)])
    with pytest.raises(UserError, match="8 responses to a single prompt"):
        Rollouts([choose_steps(tmp_path, ALL)]).split(0.5, seed=0)
