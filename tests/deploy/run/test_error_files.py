"""RUN/errors: one file for each fault with traceback, prompt and response, counts, and where the reason points."""

from __future__ import annotations

import json

from common.types import SampleId, ScoringError, Void
from deploy.run.error_files import MOST_FILES, ErrorFiles


def void(fault: str, *, number: int = 0, response: str = "yes") -> Void:
    error = ScoringError(fault, "Traceback ...\nKeyError: 'x'", "why?", response)
    return Void(SampleId(0, number, 0), f"{fault}: {number}", response=response, error=error)


def counts(run) -> list[tuple[str, int, str | None]]:
    found = json.loads((run / "errors" / "counts.json").read_text())
    return [(entry["fault"], entry["rollouts"], entry["file"]) for entry in found]


def test_each_fault_is_counted_and_has_one_file_with_its_first_answer(tmp_path):
    errors = ErrorFiles(tmp_path)
    kept = [errors.keep(void(fault, number=n)) for n, fault in enumerate(["a", "b", "a"])]
    assert [each.reason for each in kept] == [
        "a: 0; see errors/01.txt",
        "b: 1; see errors/02.txt",
        "a: 2; see errors/01.txt",
    ]
    assert [(each.sample_id.prompt, each.response, each.error) for each in kept] == [(n, "yes", None) for n in range(3)]
    text = (tmp_path / "errors" / "01.txt").read_text()
    assert text == (
        "a: 0\n\nsample 0/0/0\n\nTraceback ...\nKeyError: 'x'\n--- prompt ---\nwhy?\n--- response ---\nyes\n"
    )
    assert counts(tmp_path) == [("a", 2, "01.txt"), ("b", 1, "02.txt")]


def test_a_void_without_an_error_is_not_written(tmp_path):
    other = Void(SampleId(0, 0, 0), "too old")
    assert ErrorFiles(tmp_path).keep(other) is other
    assert list(tmp_path.iterdir()) == []


def test_the_number_of_files_is_bounded_but_counts_continue(tmp_path):
    errors = ErrorFiles(tmp_path)
    for n in range(MOST_FILES):
        errors.keep(void(f"fault {n}"))
    assert errors.keep(void("one more", number=7)).reason == "one more: 7"
    assert len(list((tmp_path / "errors").glob("*.txt"))) == MOST_FILES
    assert ("one more", 1, None) in counts(tmp_path)


def test_a_resumed_run_continues_the_counts_and_keeps_its_files(tmp_path):
    ErrorFiles(tmp_path).keep(void("a"))
    assert ErrorFiles(tmp_path).keep(void("a", number=1, response="other")).reason == "a: 1; see errors/01.txt"
    assert ErrorFiles(tmp_path).keep(void("b")).reason == "b: 0; see errors/02.txt"
    assert counts(tmp_path) == [("a", 2, "01.txt"), ("b", 1, "02.txt")]
    assert "other" not in (tmp_path / "errors" / "01.txt").read_text()


def test_damaged_counts_and_odd_text_do_not_end_the_run(tmp_path):
    (tmp_path / "errors").mkdir()
    (tmp_path / "errors" / "counts.json").write_text('[{"fault": 3}, 5]')
    ErrorFiles(tmp_path).keep(void("a", response="\ud83d"))
    assert "\\ud83d" in (tmp_path / "errors" / "01.txt").read_text()
    (tmp_path / "file").touch()
    assert ErrorFiles(tmp_path / "file").keep(void("a")).reason == "a: 0"
