"""RUN/answers: one record for each held-out answer; and RUN/summary.json."""

from __future__ import annotations

import json

from common.model.files import load_tokenizer
from common.types import Score, Void
from deploy.run.summary import summarise, write_answers
from learner.loop.evaluation import Evaluation
from tests.fakes import END, WORDS, make_prompt, make_rollout, save_tiny_model, tiny_config


def evaluation(version: int, score: float) -> Evaluation:
    return Evaluation(version, 2, 0, "", None, None, score, {"rm": score}, 0.0, 5.0, 0.5, 0.9)


def test_a_later_evaluation_is_not_called_the_one_before_training(tmp_path):
    cfg, (first, later, last) = tiny_config("unused"), (evaluation(v, v / 10) for v in (0, 2, 3))
    whole = summarise(cfg, tmp_path, [first, later, last], seconds=1.0)
    assert (whole["score_before"], whole["score_after"]) == (0.0, 0.3)
    lost = summarise(cfg, tmp_path, [later, last], seconds=1.0)
    assert lost["score_after"] == 0.3
    assert not {"score_before", "before", "win_rate"} & lost.keys()


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
