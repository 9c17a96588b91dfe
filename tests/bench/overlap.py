"""If generating and learning overlap, does a step cost only the longer of the two?

overlap_step: median seconds of a step with max_staleness = 1, over the larger of two medians: the generators' time for
one batch, and the learner's (time/learn_s of the same steps). On two cores: the generator and the services that score
its rollouts keep to the first, the learner with one thread to the second. 32 prompts of 30 to 70 tokens, 64 new tokens
for each, one epoch.

With max_staleness = 1 a generator often waits for slots. So its time for a batch comes from a second run with
max_staleness = 0: time/generate_s + time/score_s is there the time from the first prompt to the last score, on the same
core, while the learner is idle. That is the most that learning can hide. The slowdown that generating and learning
cause each other, publication and journal therefore count against the value.

A step's time runs from the record of the step before to its own. The first two steps of either run do not count: the
first waits for its rollouts and writes the next ones meanwhile. With max_staleness = 1 the last step does not count
either, because nothing is generated during it. Steps next to a generator scatter by about 20 %, and a role that is
pinned to a core cannot move away from another program: repeat a surprising result. Both runs give each role one core;
roles that take turns with both cores, as in the shipped configs, are not compared.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.bench.batch import MODEL, config
from tests.bench.fresh import call
from tests.bench.results import Result
from tests.bench.task import LONGEST, PROMPTS

STEPS, STEPS_IN_TURN, NEW_TOKENS, IGNORED = 7, 5, 64, 2
GENERATING, LEARNING = 0, 1  # cores


def run(model: str, max_staleness: int, steps: int, new_tokens: int) -> dict[str, float]:
    """Medians over the steps that count."""
    from deploy import train

    writing = {"cores": [GENERATING], "threads": 1}
    cfg = config(
        model,
        num_steps=steps,
        rollouts_per_step=PROMPTS,
        max_staleness=max_staleness,
        prompts={"train": "tests.bench.task:prompts", "max_tokens": LONGEST + 10},
        sampling={"max_new_tokens": new_tokens, "min_new_tokens": new_tokens},
        ppo={"ppo_epochs": 1},
        generators=writing,
        reference=writing,
        reward={"sources": [{"name": "variety", "function": "tests.bench.task:reward"}], **writing},
        learner={"cores": [LEARNING], "threads": 1, "micro_batch_tokens": 4096},  # of 3,648 tokens
        evaluation={"prompts": 0},
        checkpoint={"every": 1000},
        ray={"dashboard": False},
    )
    records: list[dict[str, Any]] = []

    class Progress(train.Progress):
        def step(self, record: dict[str, Any], *rest: Any) -> None:
            records.append(record | {"at": time.perf_counter()})
            super().step(record, *rest)

    train.Progress = Progress  # type: ignore[misc]
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as folder:
        train.run_training(cfg, Path(folder) / "run")
    if max_staleness:
        records.pop()
    rows = [
        {"step_s": now["at"] - before["at"]}
        | {key.removeprefix("time/"): now[key] for key in now if key.startswith(("time/", "wait/", "staleness/"))}
        for before, now in pairwise(records[IGNORED - 1 :])
    ]
    print(*rows, sep="\n")
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def measure() -> dict[str, Result]:
    overlapped = call("tests.bench.overlap:run", MODEL, 1, STEPS, NEW_TOKENS)
    in_turn = call("tests.bench.overlap:run", MODEL, 0, STEPS_IN_TURN, NEW_TOKENS)
    generate_s = in_turn["generate_s"] + in_turn["score_s"]
    parts = {
        "overlapped_step_s": overlapped["step_s"],
        "synchronous_step_s": in_turn["step_s"],
        "generate_and_measure_s": generate_s,
        "learn_s": overlapped["learn_s"],
        "publish_s": overlapped["publish_s"],
        "journal_s": overlapped["journal_s"],
        "learner_waits_s": overlapped["wait/learner_s"],
        "generators_wait_s": overlapped["wait/generators_s"],
        "synchronous_generate_s": in_turn["generate_s"],
        "synchronous_score_s": in_turn["score_s"],
        "synchronous_learn_s": in_turn["learn_s"],
        "synchronous_publish_s": in_turn["publish_s"],
    }
    ratio = overlapped["step_s"] / max(generate_s, overlapped["learn_s"])
    return {"overlap_step": Result(ratio, "<= 1.15", parts)}
