"""The score of an answer by the rule of its reasoning-gym task. Runs in each reward replica or in its worker processes,
and in the driver's trial before a run.

The process that calls `score` imports reasoning-gym. reasoning_gym_source.py says what the fields of the input are.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from common.reasoning_gym_rule import refusal, runs_answers

if TYPE_CHECKING:  # a worker process has its own RewardInput
    from common.reward_input import RewardInput


def score(answer: RewardInput) -> float:
    """The task's own score, usually from 0 to 1. Raises PermissionError if the rule would run the answer as Python code
    without permission."""
    fields = answer.fields
    data_set, runs = _data_set(fields["task"], json.dumps(fields["parameters"]))
    if runs and not fields["run_answers"]:
        raise PermissionError(refusal(fields["task"]))
    return float(data_set.score_answer(extracted(answer.response, fields["pattern"]), fields["entry"]))


def extracted(response: str, pattern: str | None) -> str | None:
    """The answer in the response: the first group of the last match, or the whole response without a pattern. None if
    nothing matches: the task then scores a missing answer."""
    if pattern is None:
        return response.strip()
    *_, last = [None, *re.finditer(pattern, response)]
    return last[1].strip() if last is not None and last[1] is not None else None


@lru_cache(maxsize=16)
def _data_set(task: str, parameters: str) -> tuple[Any, bool]:
    """A data set of the task, for its rule only, and whether the rule runs answers as Python code."""
    import reasoning_gym  # an optional package

    data_set = reasoning_gym.create_dataset(task, seed=0, size=1, **json.loads(parameters))
    return data_set, runs_answers(data_set)
