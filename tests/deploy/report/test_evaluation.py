"""The page of an evaluation: its figures are those of evaluation.json, and some answers are there."""

from __future__ import annotations

import json

import pytest

from deploy import cli
from deploy.evaluation.rows import crossover_lines, figure_rows
from deploy.report.evaluation import MAX_PROMPTS, evaluation_of
from deploy.report.report import evaluation_blocks
from tests.deploy.report.conftest import data_of
from tests.deploy.report.made_evaluation import write_evaluation

TEXTS = ["two", "three words here"]


def test_the_page_has_the_figures_and_the_curves_of_the_record(tmp_path):
    record = write_evaluation(tmp_path / "run", prompts=5, texts=TEXTS)
    found = evaluation_of(tmp_path / "run")
    assert found["curves"] == {name: of["pass_at_k"] for name, of in record["policies"].items()}
    assert found["crossovers"] == {"mine": record["policies"]["mine"]["crossover"]}
    assert found["rows"] == figure_rows(record)
    assert found["sentences"] == crossover_lines(record)
    assert found["kl"] == {name: of["kl_by_position"] for name, of in record["policies"].items()}
    assert (found["base"], found["samples"], found["finished"]) == ("base", 8, True)


def test_the_first_answers_of_all_policies_are_side_by_side(tmp_path):
    write_evaluation(tmp_path / "run", prompts=3, texts=TEXTS)
    answers = evaluation_of(tmp_path / "run")["answers"]
    assert [asked["question"] for asked in answers] == ["0 two", "1 three words here", "2 two"]
    for number, asked in enumerate(answers):
        for name in ("base", "mine"):
            lines = map(json.loads, (tmp_path / f"run/answers/{name}.jsonl").read_text().splitlines())
            [first] = [line for line in lines if (line["prompt"], line["sample"]) == (number, 0)]
            shown = asked["answers"][name]
            assert shown["text"] == first["response"]
            assert shown["score"] == first.get("score")
    assert answers[1]["answers"]["base"]["void"] == "no service"


@pytest.mark.parametrize(("prompts", "shown"), [(1, 1), (24, 24), (25, 13), (100, 20)])
def test_of_many_prompts_some_are_shown(tmp_path, prompts, shown):
    write_evaluation(tmp_path / "run", prompts=prompts, texts=["x"], samples=1)
    answers = evaluation_of(tmp_path / "run")["answers"]
    assert len(answers) == shown <= MAX_PROMPTS
    assert all(list(asked["answers"]) == ["base", "mine"] for asked in answers)


def test_an_evaluation_that_was_cut_shows_its_answers(tmp_path):
    run = tmp_path / "run"
    write_evaluation(run, prompts=2, texts=TEXTS)
    (run / "evaluation.json").unlink()
    (run / "answers/mine.jsonl").write_bytes(b'{"prompt": 0, "sam')
    blocks = evaluation_blocks(run)
    assert (blocks["run"]["state"], blocks["run"]["tabs"]) == ("stopped", ["evaluation"])
    assert [list(asked["answers"]) for asked in blocks["evaluation"]["answers"]] == [["base"], ["base"]]
    (run / "evaluated.json").unlink()  # the start was killed before it was written
    assert evaluation_of(run)["answers"][0]["answers"] == {}


@pytest.mark.parametrize("change", [{"samples": 16}, {"policies": {"base": "model", "mine": "model", "new": "p"}}])
def test_an_evaluation_that_asks_for_more_shows_no_older_figures(tmp_path, change):
    write_evaluation(tmp_path, prompts=2, texts=TEXTS)
    asked = json.loads((tmp_path / "evaluated.json").read_text())
    (tmp_path / "evaluated.json").write_text(json.dumps({**asked, **change}))
    found = evaluation_of(tmp_path)
    assert (found["finished"], found["rows"], found["curves"], found["kl"]) == (False, [], {}, {})
    assert list(found["answers"][0]["answers"]) == ["base", "mine"]


def test_an_evaluation_without_its_prompts_has_a_page(tmp_path):
    write_evaluation(tmp_path, prompts=2, texts=TEXTS)
    (tmp_path / "prompts.jsonl").unlink()
    found = evaluation_of(tmp_path)
    assert found["answers"] == []
    assert found["finished"]


def test_the_command_writes_the_page_of_an_evaluation(tmp_path, monkeypatch, capsys):
    write_evaluation(tmp_path / "run", prompts=2, texts=TEXTS)
    monkeypatch.setattr("sys.argv", ["ratchet", "report", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("2 policies, answers to 2 prompts; ")
    assert last == str(tmp_path / "run/report.html")
    values = data_of((tmp_path / "run/report.html").read_text())
    assert values["run"]["name"] == "run"
    assert values["evaluation"]["rows"][0][0] == "pass@1, %"
