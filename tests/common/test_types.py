"""Data types, and the table of experience, which keeps every value."""

import json
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pytest

from common.experience_table import EXPERIENCE_SCHEMA, experience_table, response_masks
from common.turns import messages_of
from common.types import IN_EPISODE, Experience, Prompt, RewardInput, Rollout, RolloutRef, SampleId, Score, Turn
from tests.fakes import make_prompt


def int32(*values):
    return np.array(values, dtype=np.int32)


def float32(*values):
    return np.array(values, dtype=np.float32)


def ragged_rows():
    """Three rows whose prompts have 3, 1 and 2 tokens and whose responses have 2, 4 and no tokens."""
    return [
        Experience(
            Rollout(
                Prompt(SampleId(0, 5, 1), "Grüße, 7 or 9?", int32(7, 8, 9), {"larger": 9, "tags": ["a", None]}),
                int32(3, 2),
                float32(-0.5, -0.25),
                int32(4, 4),
                "stop",
                "Generator(0)",
            ),
            Score(
                0.75,
                {"correct": 1.0, "short": 0.5},
                {"correct": "grader v2 at http://h:8001/score", "short": "tasks:short"},
                {"correct/digits": 2.0},
            ),
            float32(-1.5, -2.0),
        ),
        Experience(
            Rollout(
                Prompt(SampleId(1, 0, 0), "", int32(1), messages=[{"role": "user", "content": ""}]),
                int32(4, 5, 6, 7),
                float32(-1, -2, -3, -4),
                int32(4, 4, 5, 5),
                "length",
                "Generator(1)",
            ),
            Score(-3e8, {"correct": 0.0, "short": -6e8}, {"correct": "Größe@0123456789abcdef", "short": "tasks:short"}),
            float32(-4, -3, -2, -1),
        ),
        Experience(
            Rollout(
                Prompt(SampleId(1, 2, 0), "third", int32(2, 2)), int32(), float32(), int32(), "stop", "Generator(0)"
            ),
            Score(0.0, {}),
            float32(),
        ),
    ]


def test_an_experience_table_gives_back_every_column_of_ragged_rows():
    table = experience_table(ragged_rows())
    assert table.schema == EXPERIENCE_SCHEMA
    table.validate(full=True)
    assert table.to_pydict() == {
        "step": [0, 0, 0],
        "epoch": [0, 1, 1],
        "prompt_index": [5, 0, 2],
        "replica": [1, 0, 0],
        "prompt": ["Grüße, 7 or 9?", "", "third"],
        "response": [None, None, None],
        "fields": ['{"larger": 9, "tags": ["a", null]}', "{}", "{}"],
        "prompt_ids": [[7, 8, 9], [1], [2, 2]],
        "response_ids": [[3, 2], [4, 5, 6, 7], []],
        "rollout_logprobs": [[-0.5, -0.25], [-1.0, -2.0, -3.0, -4.0], []],
        "policy_versions": [[4, 4], [4, 4, 5, 5], []],
        "finish_reason": ["stop", "length", "stop"],
        "generator": ["Generator(0)", "Generator(1)", "Generator(0)"],
        "score": [0.75, -3e8, 0.0],
        "components": [[("correct", 1.0), ("short", 0.5)], [("correct", 0.0), ("short", -6e8)], []],
        "origins": [
            [("correct", "grader v2 at http://h:8001/score"), ("short", "tasks:short")],
            [("correct", "Größe@0123456789abcdef"), ("short", "tasks:short")],
            [],
        ],
        "figures": [[("correct/digits", 2.0)], [], []],
        "ref_logprobs": [[-1.5, -2.0], [-4.0, -3.0, -2.0, -1.0], []],
        "turns": [None, None, None],
    }


def test_a_table_has_its_step_and_the_text_of_every_response():
    def decode(responses):
        return [" ".join(map(str, ids.tolist())) for ids in responses]

    table = experience_table(ragged_rows(), step=7, decode=decode)
    assert table["step"].to_pylist() == [7, 7, 7]
    assert table["response"].to_pylist() == ["3 2", "4 5 6 7", ""]
    assert experience_table([], step=7, decode=decode).num_rows == 0


def test_logprobs_and_scores_keep_every_bit():
    logprobs, total = np.float32([-1 / 3, -1e-7]), -1 / 3
    row = ragged_rows()[0]
    rollout = Rollout(row.rollout.prompt, int32(3, 2), logprobs, int32(0, 0), "stop", "Generator(0)")
    table = experience_table([Experience(rollout, Score(total, {"s": total}), logprobs)])
    for column in ("rollout_logprobs", "ref_logprobs"):
        assert table[column][0].values.to_numpy().tobytes() == logprobs.tobytes()
    assert table["score"][0].as_py() == total
    assert dict(table["components"][0].as_py()) == {"s": total}


def test_origins_can_be_looked_up_by_the_name_of_their_component():
    table = experience_table(ragged_rows())
    for column in ("components", "origins"):
        assert list(dict(table[column][0].as_py())) == ["correct", "short"]
    assert dict(table["origins"][1].as_py())["correct"] == "Größe@0123456789abcdef"


def test_a_score_that_says_nothing_of_where_it_is_from_has_no_origins():
    row = ragged_rows()[0]
    table = experience_table([Experience(row.rollout, Score(1.0, {"correct": 1.0}), row.ref_logprobs)])
    assert table["components"].to_pylist() == [[("correct", 1.0)]]
    assert table["origins"].to_pylist() == [[]]
    assert Score(1.0, {"correct": 1.0}) == Score(1.0, {"correct": 1.0}, {})
    assert Score(1.0, {"correct": 1.0}, {"correct": "m:f"}) != Score(1.0, {"correct": 1.0}, {"correct": "m:g"})


def test_prompt_and_reward_input_have_no_messages_unless_they_are_given():
    assert Prompt(SampleId(0, 0, 0), "text", int32(1)).messages is None
    assert RewardInput("text", "yes", 2, "stop", {}).messages is None
    messages = [{"role": "user", "content": "text"}]
    assert RewardInput("text", "yes", 2, "stop", {}, messages).messages is messages
    assert ragged_rows()[1].rollout.prompt.messages == [{"role": "user", "content": ""}]


def test_fields_of_a_record_come_back_from_their_json():
    rows = ragged_rows()
    assert json.loads(experience_table(rows)["fields"][0].as_py()) == rows[0].rollout.prompt.fields


def test_a_table_of_no_rows_has_the_schema():
    table = experience_table([])
    assert (table.num_rows, table.schema) == (0, EXPERIENCE_SCHEMA)


def test_a_table_keeps_the_order_of_its_rows():
    rows = ragged_rows()
    assert experience_table(rows[::-1])["prompt_index"].to_pylist() == [2, 0, 5]
    assert pa.concat_tables([experience_table([row]) for row in rows])["prompt_index"].to_pylist() == [5, 0, 2]


def test_a_sample_id_reads_back_from_its_text():
    assert str(SampleId(2, 31, 0)) == "2/31/0"
    assert SampleId.parse("2/31/0") == SampleId(2, 31, 0)
    assert SampleId.parse(str(SampleId(-1, 4, 0))) == SampleId(-1, 4, 0)  # held out
    with pytest.raises(ValueError, match="unpack"):
        SampleId.parse("2/31")


def test_a_rollout_counts_prompt_and_response_tokens():
    assert [row.rollout.num_tokens for row in ragged_rows()] == [5, 5, 2]


def test_reference_logprobs_that_nobody_asked_for_are_null():
    first, second, empty = ragged_rows()
    table = experience_table([replace(first, ref_logprobs=None), second, empty, replace(empty, ref_logprobs=None)])
    assert table["ref_logprobs"].to_pylist() == [None, [-4.0, -3.0, -2.0, -1.0], [], None]


def test_tokens_of_an_environment_are_the_gaps_between_turns():
    turns = (Turn(2, 4, 0.5, '[{"role": "user", "content": "no"}]', '{"k": 1}', 0.25, 7), Turn(5, 5, 1.0))
    rollout = Rollout(make_prompt(), np.arange(5, dtype=np.int32), *np.zeros((2, 3)), "terminated", "G", turns)
    assert rollout.response_mask.tolist() == [True, True, False, False, True]
    assert rollout.sampled_ids.tolist() == [0, 1, 4]
    assert rollout.turn_start == 5
    assert RolloutRef.of(rollout).finished
    assert not RolloutRef.of(replace(rollout, finish_reason=IN_EPISODE)).finished
    table = experience_table([Experience(rollout, Score(1.0, {}), np.zeros(3, np.float32))])
    kept = [{name: value for name, value in asdict(turn).items() if name != "restarts"} for turn in turns]
    assert table["turns"].to_pylist() == [kept]
    assert [mask.tolist() for mask in response_masks(table)] == [rollout.response_mask.tolist()]


def test_the_messages_of_an_episode_are_given_with_their_answers():
    first, second, ended = Turn(1, 3, 0.0), Turn(3, 4, 0.0), Turn(5, 5, 1.0)  # the second message has no token
    assert list(messages_of([first, second], 5)) == [(0, 1, first), (3, 3, second), (4, 5, None)]
    assert list(messages_of([first, ended], 5)) == [(0, 1, first), (3, 5, ended)]
    assert list(messages_of([], 5)) == [(0, 5, None)]
    assert list(messages_of([], 0)) == [(0, 0, None)]
