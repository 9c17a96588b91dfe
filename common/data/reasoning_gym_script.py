"""Makes questions of a reasoning-gym task. Runs in a process of its own, which the driver starts for each source.

It reads one request, a JSON object, and prints one JSON object per line: first how answers are scored, then each
question with its answer and metadata. If the task cannot be used, the last line has the reason under `error`.
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from common.data.json_values import json_values
from common.errors import UserError
from common.reasoning_gym_rule import runs_answers

ITEMS = 500  # of one data set of the package; the next one has another seed
HELD_OUT = 5  # one question in this many
CHECKED = 3  # questions whose scores are compared before and after a conversion to JSON
LIMIT_S = 60  # longest time for one question, or for the data set before its first one
_OWN = ("seed", "size")  # parameters of every task that Ratchet sets


def main() -> None:
    request, output = json.load(sys.stdin), sys.stdout
    sys.stdout = sys.stderr  # a task may print
    signal.signal(signal.SIGALRM, _too_slow)
    try:
        for found in questions(**request):
            output.write(f"{json.dumps(found)}\n")
    except UserError as error:
        output.write(f"{json.dumps({'error': str(error)})}\n")
    output.flush()


def questions(task: str, parameters: dict[str, Any], count: int, heldout: bool, seed: int) -> Iterator[dict[str, Any]]:
    """Up to `count` different questions, after an object that says how their answers are scored. Ends early when a
    whole data set has no new question."""
    check_parameters(task, parameters)
    seen: set[str] = set()
    chunk, before = 0, -1
    while len(seen) < count and len(seen) > before:
        before = len(seen)
        # Item k of a data set depends on seed + k only, so neighbouring seeds would give the same questions.
        first = random.Random(f"{seed} {'heldout' if heldout else 'train'} {chunk}").getrandbits(31)
        data_set = make(task, seed=first, size=ITEMS, **parameters)
        if not chunk:
            yield {"runs_answers": runs_answers(data_set)}
        for index in range(ITEMS):
            entry = _within_limit(data_set.__getitem__, index)
            question = entry["question"]
            if question in seen or is_held_out(question) != heldout:
                continue
            kept = as_json(task, entry)
            if len(seen) < CHECKED:
                check_scores(data_set, entry, kept)
            seen.add(question)
            yield kept
            if len(seen) == count:
                break
        chunk += 1


def is_held_out(question: str) -> bool:
    """True for one question in HELD_OUT, by its hash: it is held out with every seed and every number of questions."""
    digest = hashlib.sha256(question.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) % HELD_OUT == 0


def check_parameters(task: str, parameters: dict[str, Any]) -> None:
    """Raises UserError for a task or a parameter that does not exist."""
    import reasoning_gym  # fills the table of tasks  # noqa: F401
    from reasoning_gym.factory import DATASETS

    tasks = sorted(DATASETS.keys() - {"composite"})  # composite needs objects as parameters
    if task not in tasks:
        near = get_close_matches(task, tasks, n=4)
        hint = f"did you mean {', '.join(near)}?" if near else f"its tasks are {', '.join(tasks)}"
        raise UserError(f"there is no such task; {hint}")
    known = [parameter.name for parameter in fields(DATASETS[task][1]) if parameter.name not in _OWN]
    for name in parameters:
        if name not in known:
            near = get_close_matches(name, known, n=2)
            hint = f"did you mean {', '.join(near)}?" if near else f"its parameters are {', '.join(known)}"
            raise UserError(f"the task has no parameter {name} (prompts.reasoning_gym.parameters); {hint}")


def make(task: str, **parameters: Any) -> Any:
    """The package's data set. Raises UserError if it refuses the parameters."""
    import reasoning_gym

    return _within_limit(reasoning_gym.create_dataset, task, **parameters)


def as_json(task: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Question, answer and metadata as they come back from a journal. Raises UserError if that is impossible."""
    try:
        kept = json_values(task, {key: entry[key] for key in ("question", "answer", "metadata")})
    except UserError as error:
        reason = str(error).rpartition("; ")[0]
        raise UserError(f"its questions cannot be kept as JSON ({reason}); choose another task") from None
    return json.loads(json.dumps(kept))


def check_scores(data_set: Any, entry: dict[str, Any], kept: dict[str, Any]) -> None:
    """Raises UserError if the right answer scores less with an entry that was kept as JSON, such as one with lists for
    tuples."""
    answer = entry["answer"]
    if not isinstance(answer, str):  # the task has no single right answer
        return
    scores = [_within_limit(data_set.score_answer, answer, one) for one in (entry, kept)]
    if scores[0] != scores[1]:
        raise UserError(
            f"its questions cannot be kept as JSON: the right answer then scores {scores[1]:g} instead of "
            f"{scores[0]:g}; choose another task"
        )


def _within_limit(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """The result of the call. Raises UserError if it fails or takes longer than LIMIT_S."""
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        return call(*arguments, **named)
    except Exception as error:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise UserError(
            f"the task fails ({text}); correct its parameters (prompts.reasoning_gym.parameters), or choose another "
            "task"
        ) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _too_slow(number: int, frame: Any) -> None:
    raise TimeoutError(f"one question took longer than {LIMIT_S} s")


if __name__ == "__main__":
    main()
