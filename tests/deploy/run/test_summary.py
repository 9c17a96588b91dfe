"""RUN/answers: one record for each held-out answer."""

from __future__ import annotations

import json

from common.model.files import load_tokenizer
from common.types import Score, Void
from deploy.run.summary import write_answers
from tests.fakes import END, WORDS, make_prompt, make_rollout, save_tiny_model


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
