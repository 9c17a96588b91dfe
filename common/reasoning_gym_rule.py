"""Says whether the rule of a reasoning-gym task runs responses as Python code. Runs in the process that makes the
questions, and in each process that scores answers.

Worker processes of reward functions import this file, so it imports only the standard library.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

# Rules that evaluate only their entry do not count: entries are made by the package itself.
_RUNS_ANSWERS = re.compile(r"\b(eval|exec|parse_expr|sympify)\s*\((?!entry\b)")


def runs_answers(data_set: Any) -> bool:
    """True if the rule of this data set passes the answer to Python's eval, directly or through sympy."""
    return bool(_RUNS_ANSWERS.search(inspect.getsource(type(data_set).score_answer)))


def refusal(task: str) -> str:
    """Why a task that runs responses is not scored, and the remedy."""
    return (
        f"would run responses as Python code, because the rule of the task {task} does; allow it with "
        "run_answers = true, or choose another task"
    )
