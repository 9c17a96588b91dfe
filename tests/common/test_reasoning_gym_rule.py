"""Which tasks of reasoning-gym run responses as Python code: all of them are known, by name and by file."""

import re
from pathlib import Path

import pytest

from common.reasoning_gym_rule import runs_answers

factory = pytest.importorskip("reasoning_gym.factory")

ROOT = Path(__file__).parents[2]
RUN = "binary_matrix countdown intermediate_integration n_queens polynomial_multiplication puzzle24 simple_integration"
RUN = {*RUN.split(), "spiral_matrix", "string_insertion"}
# Files that run code of other origin: of the entry (bitwise_arithmetic, number_sorting), of questions that the package
# makes (basic_arithmetic, the generators, codeio), or none (propositional_logic has a parser of the same name).
OTHER = {"basic_arithmetic", "bitwise_arithmetic", "codeio", "generators_00_49", "generators_50_99", "number_sorting"}
OTHER |= {"propositional_logic"}


def test_the_tasks_that_run_answers_are_those_of_the_docs():
    assert {task for task, (kind, _) in factory.DATASETS.items() if runs_answers(object.__new__(kind))} == RUN
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    [sentence] = re.findall(r"The rules of ([^.]*) pass the answer", page)
    assert set(re.findall(r"`(\w+)`", sentence)) == RUN


def test_no_other_file_of_the_package_runs_text():
    """A rule that runs answers in a helper of its own would not be found: a new version that has one fails here."""
    code = re.compile(r"(?<![\w.])(eval|exec|__import__)\(|\b(parse_expr|sympify|lambdify|parse_latex|loads?)\(")
    files = Path(factory.__file__).parent.rglob("*.py")
    found = {file.stem for file in files if code.search(file.read_text(encoding="utf-8").replace("json.load", ""))}
    assert found == RUN | OTHER
