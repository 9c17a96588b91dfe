"""A run directory is not overwritten unasked and not shared; held-out answers are written as records."""

from __future__ import annotations

import json

import pytest

from common.config import UserError
from common.models import load_tokenizer
from common.types import Score, Void
from deploy.run_directory import clear, refuse_overwriting, sole_owner, write_answers
from tests.fakes import END, WORDS, make_prompt, make_rollout, save_tiny_model


def test_a_new_or_empty_directory_may_begin_a_run(tmp_path):
    refuse_overwriting(tmp_path / "new", force=False)
    refuse_overwriting(tmp_path, force=False)


def test_a_run_is_replaced_only_when_asked_and_anything_else_never(tmp_path):
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(UserError, match=r"--resume.*--force"):
        refuse_overwriting(tmp_path, force=False)
    refuse_overwriting(tmp_path, force=True)
    (tmp_path / "config.toml").rename(tmp_path / "thesis.toml")
    with pytest.raises(UserError, match="no run"):
        refuse_overwriting(tmp_path, force=True)


def test_two_runs_cannot_hold_one_directory(tmp_path):
    with sole_owner(tmp_path / "run"):
        with pytest.raises(UserError, match="another process trains in"), sole_owner(tmp_path / "run"):
            pass
        (tmp_path / "run/journal").mkdir()
        clear(tmp_path / "run")
        assert list((tmp_path / "run").iterdir()) == []
    with sole_owner(tmp_path / "run"):  # and it is free again
        pass


def test_an_error_inside_is_not_taken_for_a_held_directory(tmp_path):
    with pytest.raises(BlockingIOError), sole_owner(tmp_path):
        raise BlockingIOError


def test_answers_are_records_of_text_and_scores_or_of_why_there_is_none(tmp_path):
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
