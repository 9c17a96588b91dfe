"""The answers on disk: wherever a kill cuts them, nothing that was written is lost and nothing is asked twice."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

from common.types import SampleId, Score, Turn, Void
from deploy.evaluation.answers import AnswerFile, write_prompts
from learner.evaluation.answer_figures import figures_of
from learner.evaluation.asking import questions
from learner.evaluation.bootstrap import Bootstrap
from learner.loop.answers import Answered
from tests.fakes import as_episode, make_experience, make_prompt, make_rollout

SAMPLES = 2


def decode(responses):
    return [" ".join(f"t{token}" for token in ids) for ids in responses]


@pytest.fixture
def prompts():
    return [replace(make_prompt(i), sample_id=SampleId(-1, i, 0)) for i in range(3)]


def answer(prompt):
    """An answer that follows from the sample id alone, as with an engine. Its numbers need all digits of float32."""
    _, number, sample = prompt.sample_id
    rollout = make_rollout(prompt, [10 + number, 20 + sample, 1][sample:])
    draws = np.random.default_rng([number, sample])
    logprobs, ref_logprobs = (-draws.exponential(size=3 - sample).astype(np.float32) for _ in range(2))
    score = Score(0.1 + number / 3, {"exact": number / 3, "gold": 1e-7}, {"exact": "m:f", "gold": "g"})
    return Answered(replace(rollout, rollout_logprobs=logprobs), score, ref_logprobs)


def same(found, expected):
    assert list(found) == sorted(expected)
    for sample_id, one in expected.items():
        other = found[sample_id]
        assert other.rollout.prompt.sample_id == one.rollout.prompt.sample_id
        assert (other.rollout.prompt.text, other.rollout.finish_reason) == (
            one.rollout.prompt.text,
            one.rollout.finish_reason,
        )
        np.testing.assert_array_equal(other.rollout.response_ids, one.rollout.response_ids)
        np.testing.assert_array_equal(other.rollout.rollout_logprobs, one.rollout.rollout_logprobs)
        np.testing.assert_array_equal(other.ref_logprobs, one.ref_logprobs)
        assert other.score == one.score
        assert other.rollout.turns == one.rollout.turns
        np.testing.assert_array_equal(other.rollout.sampled_ids, one.rollout.sampled_ids)


def test_answers_are_read_as_they_were_written(tmp_path, prompts):
    write_prompts(tmp_path, prompts)
    file = AnswerFile(tmp_path, "mine", prompts, decode)
    asked = questions(prompts, SAMPLES, set())
    for part in (asked[3:], asked[:3]):
        file.append([answer(prompt) for prompt in part])
    same(file.read(SAMPLES), {prompt.sample_id: answer(prompt) for prompt in asked})
    lines = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert lines[0]["response"] == "t21 t1"
    assert [(line["prompt"], line["sample"]) for line in lines] == [(0, 1), (1, 1), (2, 1), (0, 0), (1, 0), (2, 0)]
    assert [json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").open()] == [p.text for p in prompts]


def episode(prompt):
    """An answer in two turns. The environment replaced the prompt of every second one."""
    _, number, sample = prompt.sample_id
    if number % 2:
        prompt = replace(prompt, text=f"seed {sample}", token_ids=np.array([9, 9], np.int32))
    row = make_experience(0, [10 + number, 40, 41, 20 + sample, 1])
    draws = np.random.default_rng([number, sample])
    logprobs, ref_logprobs = (-draws.exponential(size=5).astype(np.float32) for _ in range(2))
    rollout = replace(row.rollout, prompt=prompt, rollout_logprobs=logprobs, finish_reason="terminated")
    said = json.dumps([{"role": "user", "content": "höher\n"}])
    turns = (
        Turn(1, 3, 0.1 + number / 3, said, '{"calls": 1}', 0.7, 0, new_context=number > 0, ends=number == 2),
        Turn(5, 5, 1e-7, "[]", "{}", 1 / 3, 12),
    )
    row = as_episode(replace(row, rollout=rollout, ref_logprobs=ref_logprobs), *turns)
    return Answered(row.rollout, Score(1.0 + number / 3, {"game": 1.0}, {"game": "environment"}), row.ref_logprobs)


def test_episodes_are_read_as_they_were_written(tmp_path, prompts):
    write_prompts(tmp_path, prompts)
    asked = questions(prompts, SAMPLES, set())
    expected = {prompt.sample_id: episode(prompt) for prompt in asked}
    AnswerFile(tmp_path, "mine", prompts, decode).append(list(expected.values()))
    file = AnswerFile(tmp_path, "mine", prompts, decode)
    same(file.read(SAMPLES), expected)
    lines = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert lines[0]["response"] == "t10 t40 t41 t20 t1"
    assert lines[0]["tokens"] == [10, 40, 41, 20, 1]
    assert [len(line["logprobs"]) for line in lines] == [3] * len(lines)
    assert ["asked" in line for line in lines] == [bool(line["prompt"] % 2) for line in lines]


def test_the_figures_of_episodes_do_not_change_when_an_evaluation_is_resumed(tmp_path, prompts):
    write_prompts(tmp_path, prompts)
    asked = questions(prompts, SAMPLES, set())
    whole, parts = (AnswerFile(tmp_path, name, prompts, decode) for name in ("whole", "parts"))
    whole.append([episode(prompt) for prompt in asked])
    parts.append([episode(prompt) for prompt in asked[:2]])
    with open(parts.path, "ab") as file:
        file.write(whole.path.read_bytes().splitlines()[3][:90])  # a kill
    resumed = AnswerFile(tmp_path, "parts", prompts, decode)
    left = questions(prompts, SAMPLES, set(resumed.read(SAMPLES)))
    assert len(left) == len(asked) - 2
    resumed.append([episode(prompt) for prompt in left])
    found, expected = (
        figures_of(list(file.read(SAMPLES).values()), None, [], Bootstrap(3, seed=0)) for file in (resumed, whole)
    )
    assert found == expected
    assert found["response_tokens"]["value"] == 3.0
    assert found["cut_off"]["value"] == 0.0


@pytest.mark.parametrize(
    "change",
    [
        {"end": 4, "next_start": 3},  # the next one ends before it begins
        {"end": -4},  # from the end it is the same place
        {"end": 0},  # another number of sampled tokens
        {"next_start": 2},
        {"reward": None},
        {"end": "first"},
    ],
    ids=str,
)
def test_an_episode_whose_turns_are_damaged_is_asked_again(tmp_path, prompts, change):
    write_prompts(tmp_path, prompts)
    file = AnswerFile(tmp_path, "mine", prompts, decode)
    file.append([episode(prompts[0])])
    record = json.loads(file.path.read_text())
    record["turns"][0] |= change
    file.path.write_text(json.dumps(record) + "\n")
    assert AnswerFile(tmp_path, "mine", prompts, decode).read(1) == {}
    intact = asdict(episode(prompts[0]).rollout.turns[0])
    empty = {**record["turns"][1], "new_context": True}  # a new context without a prompt
    file.path.write_text(json.dumps({**record, "turns": [intact, empty]}) + "\n")
    assert AnswerFile(tmp_path, "mine", prompts, decode).read(1) == {}
    file.path.write_text(json.dumps({**record, "turns": [7]}) + "\n")
    assert AnswerFile(tmp_path, "mine", prompts, decode).read(1) == {}


def test_a_kill_at_any_byte_loses_only_the_unfinished_line(tmp_path, prompts, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # a thousand of them take ten seconds
    prompts = prompts[:1]
    write_prompts(tmp_path, prompts)
    whole = AnswerFile(tmp_path, "whole", prompts, decode)
    asked = questions(prompts, SAMPLES, set())
    whole.append([answer(prompt) for prompt in asked])
    text, expected = whole.path.read_bytes(), whole.read(SAMPLES)
    for size in range(len(text) + 1):
        file = AnswerFile(tmp_path, "cut", prompts, decode)
        file.path.write_bytes(text[:size])
        known = file.read(SAMPLES)
        lines = text[:size].count(b"\n") + (text[size : size + 1] == b"\n")  # a line may lack nothing but its end
        assert list(known) == sorted(prompt.sample_id for prompt in asked[:lines])
        if left := questions(prompts, SAMPLES, set(known)):
            file.append([answer(prompt) for prompt in left])
        for one in (file, AnswerFile(tmp_path, "cut", prompts, decode)):  # what it knows is what it has written
            same(one.read(SAMPLES), expected)
        assert len(known) + len(left) == len(asked)


def test_the_newest_answer_counts(tmp_path, prompts):
    write_prompts(tmp_path, prompts)
    file = AnswerFile(tmp_path, "mine", prompts, decode)
    void = Void(prompts[0].sample_id, "no service")
    file.append([answer(prompts[0])._replace(score=void)])
    assert file.read(1)[prompts[0].sample_id].score == void
    file.append([answer(prompts[0])])
    same(file.read(1), {prompts[0].sample_id: answer(prompts[0])})
    file.append([answer(prompts[0])._replace(score=void)])  # asked again for its judge, without luck
    same(file.read(1), {prompts[0].sample_id: answer(prompts[0])})


def test_a_judge_without_a_score_is_read_with_its_reason(tmp_path, prompts):
    write_prompts(tmp_path, prompts)
    file = AnswerFile(tmp_path, "mine", prompts, decode)
    failed = Score(1.0, {"exact": 1.0}, {"exact": "m:f"}, judge_voids={"gold": Void(prompts[0].sample_id, "down")})
    file.append([answer(prompts[0])._replace(score=failed)])
    assert file.read(1)[prompts[0].sample_id].score == failed


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": 3},  # there are three prompts
        {"sample": 1},  # one sample is asked for
        {"sample": "first"},
        {"tokens": [1, 2]},  # fewer than log-probabilities
        {"logprobs": None},
        {"score": "good"},
        {"components": 1},
        {"judge_voids": 1},
    ],
    ids=str,
)
def test_a_line_that_is_no_answer_is_asked_again(tmp_path, prompts, change):
    write_prompts(tmp_path, prompts)
    file = AnswerFile(tmp_path, "mine", prompts, decode)
    file.append([answer(prompts[0])])
    file.path.write_text(json.dumps({**json.loads(file.path.read_text()), **change}) + "\n[1]\n{\n")
    assert file.read(1) == {}


@pytest.mark.parametrize("key", ["prompt", "sample", "tokens"])
def test_an_answer_with_a_number_that_is_too_large_is_asked_again(tmp_path, prompts, key):
    write_prompts(tmp_path, prompts)
    asked = questions(prompts, 1, set())
    AnswerFile(tmp_path, "mine", prompts, decode).append([answer(prompt) for prompt in asked])
    file = AnswerFile(tmp_path, "mine", prompts, decode)
    first, *others = file.path.read_text().splitlines()
    record = json.loads(first)
    record[key] = [10**400] * len(record[key]) if key == "tokens" else 10**400
    file.path.write_text("\n".join([json.dumps(record), *others]) + "\n")
    same(file.read(1), {prompt.sample_id: answer(prompt) for prompt in asked[1:]})
