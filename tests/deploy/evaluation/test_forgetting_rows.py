"""The rows of the table of `ratchet evaluate` about forgetting, diversity and judges."""

import io

from rich.console import Console

from deploy.evaluation.figure_text import number_text, percent_text
from deploy.evaluation.forgetting_rows import forgetting_rows, judge_lines
from deploy.screen.evaluation_table import evaluation_summary
from learner.loop.evaluation import Evaluation


def figure(value, spread=0.5):
    return {"value": value, "interval": [value - spread, value + spread]}


def policy(*, ratio=None, fell=None):
    """Figures of one policy as in evaluation.json."""
    judge = {"score": figure(0.25), "correlation": figure(0.125, 0.25)}
    judge |= {} if fell is None else {"change": figure(-2, 1), "proxy_rose_judge_fell": fell}
    return {
        "path": "p",
        "voids": 0,
        "score": figure(1.5),
        "components": {"rm": figure(1.5), "gold": figure(0.25)},
        "kl_per_response": figure(12.5),
        "response_tokens": figure(123.5),
        "cut_off": figure(0.5, 0.25),
        "perplexity": {"shipped": figure(23.456)},
        **({} if ratio is None else {"perplexity_ratio": {"shipped": figure(ratio, 0.125)}}),
        "entropy": figure(1.25),
        "distinct_1": figure(0.5),
        "distinct_2": figure(0.75),
        "distinct_3": {"value": 1.0, "interval": None},
        "different_answers": figure(0.5, 0.25),
        "proxy": {"score": figure(1.5), "change": figure(3, 1)},
        "judges": {"gold": judge},
    }


POLICIES = {"base": policy(), "mine": policy(ratio=1.25, fell=True), "other": policy(ratio=1.5, fell=False)}
RECORD = {"base": "base", "samples": 4, "prompts": 256, "policies": POLICIES}


def test_every_figure_has_a_row_with_a_cell_for_each_policy():
    policies = list(POLICIES.values())
    rows = {label: [cell(figures) for figures in policies] for label, cell in forgetting_rows(policies)}
    assert rows == {
        "perplexity, shipped": ["23.46 (22.96, 23.96)"] * 3,
        "  / that of the base": ["", "1.250 (1.125, 1.375)", "1.500 (1.375, 1.625)"],
        "entropy, nats": ["1.250 (0.750, 1.750)"] * 3,
        "distinct-1, -2, -3": ["0.50, 0.75, 1.00"] * 3,
        "different, %": ["50.0 (25.0, 75.0)"] * 3,
        "correlation of score and gold": ["0.12 (-0.12, 0.38)"] * 3,
    }


def test_a_judge_that_fell_is_named_with_both_changes():
    assert judge_lines(RECORD) == [
        "mine is over-optimised: compared with the base, its score changed by +3 (+2, +4), and gold by -2 (-3, -1)"
    ]


def test_policies_without_these_figures_have_empty_cells():
    old = {"path": "p", "score": figure(1.0)}
    assert {cell(old) for _, cell in forgetting_rows([old])} == {""}
    assert judge_lines({"policies": {"old": old}}) == []
    assert number_text({"value": None, "interval": None}, ".2f") == percent_text(None) == ""
    assert percent_text({"value": 0.25, "interval": None}) == "25.0"


def test_one_answer_of_one_policy_shows_entropy_judges_and_texts():
    run = Evaluation(0, 256, 0, "", None, None, 1.5, {}, 12.5, 123.5, 0.5, 0.75)
    console = Console(file=io.StringIO(), width=100)
    [table] = evaluation_summary(
        {**RECORD, "policies": {"p": policy()}, "policy": "p", "reference": "m", **run.record()}
    )
    console.print(table)
    shown = console.file.getvalue()
    for row in ("perplexity, shipped", "entropy, nats", "distinct-1, -2, -3", "correlation of score and gold"):
        assert shown.count(row) == 1
    assert "1.250 (0.750, 1.750)" in shown
    assert "that of the base" not in shown


def test_the_table_of_three_policies_fits_100_columns():
    console = Console(file=io.StringIO(), width=100)
    table, *lines = evaluation_summary(RECORD)
    console.print(table)
    shown = console.file.getvalue().splitlines()
    assert max(map(len, shown)) <= 100
    [row] = [line for line in shown if "that of the base" in line]
    assert row.split("│")[-2].strip() == "1.500 (1.375, 1.625)"
    assert lines == judge_lines(RECORD)
