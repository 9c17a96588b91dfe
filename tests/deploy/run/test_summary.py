"""RUN/answers: one record for each held-out answer; and RUN/summary.json."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from common.model.files import load_tokenizer
from common.types import Score, Turn, Void
from deploy.run.summary import summarise, write_answers
from learner.loop.evaluation import Evaluation
from tests.fakes import END, WORDS, as_episode, make_experience, make_prompt, make_rollout, save_tiny_model, tiny_config


def evaluation(version: int, score: float) -> Evaluation:
    return Evaluation(version, 2, 0, "", None, None, score, {"rm": score}, 0.0, 5.0, 0.5, 0.9)


def test_a_later_evaluation_is_not_called_the_one_before_training(tmp_path):
    cfg, (first, later, last) = tiny_config("unused"), (evaluation(v, v / 10) for v in (0, 2, 3))
    whole = summarise(cfg, tmp_path, [first, later, last], seconds=1.0)
    assert (whole["score_before"], whole["score_after"]) == (0.0, 0.3)
    lost = summarise(cfg, tmp_path, [later, last], seconds=1.0)
    assert lost["score_after"] == 0.3
    assert not {"score_before", "before", "win_rate"} & lost.keys()


def test_the_critics_figures_are_means_of_the_last_five_steps(tmp_path):
    explained, cfg = "value/explained_variance", tiny_config("unused")
    parts = ["first", *(f"quarter_{n}" for n in range(1, 5)), "last"]
    with open(tmp_path / "metrics.jsonl", "w", encoding="utf-8") as file:
        for step in range(8):  # explained: 0.0, 0.1 ... 0.7; variance: 8, 7 ... 1
            figures = {f"{explained}/{part}": step / 10 + place for place, part in enumerate(parts)}
            figures |= {explained: step / 10, f"{explained}/realised": -step / 10}
            record = {"step": step, "value/returns_var/realised": 8 - step, **figures}
            file.write(json.dumps(record) + "\n")
        file.write(json.dumps({"step": 8, "void": "a step in which nothing was learned"}) + "\n")
    whole = summarise(cfg, tmp_path, [], seconds=1.0)
    assert whole["explained_variance"] == pytest.approx(0.5)  # (0.3 + 0.4 + 0.5 + 0.6 + 0.7) / 5
    assert whole["explained_variance_realised"] == pytest.approx(-0.5)
    assert whole["explained_variance_by_position"] == {
        part: pytest.approx(0.5 + place) for place, part in enumerate(parts)
    }
    assert whole["returns_var_start"] == 6.0  # (8 + 7 + 6 + 5 + 4) / 5
    assert whole["returns_var_end"] == 3.0  # (5 + 4 + 3 + 2 + 1) / 5


def test_a_run_without_a_critic_has_no_figures_of_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "rollout/score/mean": 1.0}\n')
    assert summarise(tiny_config("unused"), tmp_path, [], seconds=1.0).keys() == {"seed", "num_steps", "seconds"}


def test_answers_have_text_and_scores_or_the_reason_of_the_void(tmp_path):
    tokenizer = load_tokenizer(save_tiny_model(tmp_path / "model"))
    first, second = make_prompt(0), make_prompt(1)
    words = [WORDS.index("a3"), WORDS.index("b7")]
    answers = [
        (make_rollout(first, [*words, END]), Score(1.5, {"rm": 0.5, "gold": -1.0}, {"rm": "model@0f", "gold": "m:f"})),
        (make_rollout(second, words), Void(second.sample_id, "no service")),
    ]
    path = tmp_path / "answers/version-000000.jsonl"
    write_answers(path, [*answers, *answers], tokenizer)
    write_answers(path, answers, tokenizer)  # a resumed run evaluates again
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {
            "prompt": "prompt 0",
            "response": "a3 b7",  # without the end token
            "finish_reason": "stop",
            "score": 1.5,
            "components": {"rm": 0.5, "gold": -1.0},
            "origins": {"rm": "model@0f", "gold": "m:f"},
        },
        {"prompt": "prompt 1", "response": "a3 b7", "finish_reason": "length", "void": "no service"},
    ]


def test_an_episode_has_its_turns_one_by_one(tmp_path):
    tokenizer = load_tokenizer(save_tiny_model(tmp_path / "model"))
    ids = [WORDS.index(word) for word in ("a3", "<end>", "b1", "b2", "a4", "a5")]
    said = [{"role": "tool", "content": "7 é"}]
    turns = [Turn(2, 4, 0.5, json.dumps(said), '{"tool_calls": 1}', 0.1, 3)]
    row = as_episode(make_experience(0, ids), *turns)
    ended = replace(row.rollout, turns=(*turns, Turn(6, 6, 1.0)), finish_reason="terminated")
    path = tmp_path / "answers/version-000000.jsonl"
    score = Score(1.5, {"game": 1.5}, {"game": "environment"})
    write_answers(path, [(row.rollout, score), (ended, score)], tokenizer)
    cut_off, whole = (json.loads(line) for line in path.read_text().splitlines())
    assert whole["response"] == cut_off["response"] == "a3 b1 b2 a4 a5"
    first = {"text": "a3", "observation": said, "reward": 0.5, "info": {"tool_calls": 1}}
    assert cut_off["turns"] == [first, {"text": "a4 a5"}]
    assert whole["turns"] == [first, {"text": "a4 a5", "observation": [], "reward": 1.0, "info": {}}]
    assert whole["finish_reason"] == "terminated"
