"""The cost of RUN/credit: time and bytes, relative to the update and to the journal file of the same step.

credit_vs_update: seconds in which a step's file is gathered and written, over those of the update before it. A step
also generates, scores and publishes, so the share of a whole step is smaller.

credit_vs_journal: bytes of that file over those of the journal's, with responses of 4 characters a token.

Both with policy and shared critic in one process, one epoch of one minibatch, random tokens and random weights of the
critic's head: real values compress better, and short files are mostly headers. `long_` has 8 rollouts of 192 prompt
and 192 response tokens, `short_` 64 rollouts of 24 and 8. The median of the rounds counts.
"""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from learner.loop.credit import credit_path, write_credit
from learner.loop.journal import Journal
from learner.ppo.learner import Learner
from tests.bench.batch import MODEL, batch, config
from tests.bench.fresh import call
from tests.bench.learner import timed
from tests.bench.results import Result

THREADS, ROUNDS = 2, 3
SHAPES = {"long": (8, 384, 0.5), "short": (64, 32, 0.25)}  # rollouts, their tokens, share of the response


def costs(model: str, threads: int, rounds: int, rollouts: int, tokens: int, share: float) -> dict[str, float]:
    """Medians of the rounds: seconds of the update and of its credit, bytes of both files."""
    table = with_texts(batch(model, rollouts=rollouts, shortest=tokens, longest=tokens), round(tokens * share))
    learner = Learner(config(model, ppo={"ppo_epochs": 1}, learner={"threads": threads}))
    torch.nn.init.normal_(learner.network.value_head.weight, std=0.02)
    laps = []
    with tempfile.TemporaryDirectory(prefix="ratchet-bench-") as folder:
        journal, directory = Journal(Path(folder) / "journal"), Path(folder) / "credit"
        journal.open_for_writing()
        journal.note("begin")
        for step in range(rounds):
            journal_s, _ = timed(lambda: journal.append(table, policy_version=0, prompts={}))
            entry, digest = journal.read(step), journal.digest(step + 1)
            update_s, _ = timed(lambda: learner.update(table))
            gather_s, derived = timed(learner.credit)
            write_s, _ = timed(partial(write_credit, directory, entry, derived, journal=digest))
            sizes = {
                "journal_bytes": (journal.directory / f"step-{step:06d}.arrow").stat().st_size,
                "credit_bytes": credit_path(directory, step).stat().st_size,
            }
            seconds = {"update_s": update_s, "gather_s": gather_s, "write_s": write_s, "journal_s": journal_s}
            laps.append({**seconds, **sizes, "time_ratio": (gather_s + write_s) / update_s})
    medians = {key: statistics.median(lap[key] for lap in laps[rounds > 1 :]) for key in laps[0]}
    return medians | {"bytes_ratio": medians["credit_bytes"] / medians["journal_bytes"]}


def with_texts(table: pa.Table, response_tokens: int) -> pa.Table:
    """The same rollouts with longer prompts and responses of this many tokens, and texts of 4 characters a token."""
    rows = table.to_pylist()
    for row in rows:
        ids = row["prompt_ids"] + row["response_ids"]
        row["prompt_ids"], row["response_ids"] = ids[:-response_tokens], ids[-response_tokens:]
        for column in ("rollout_logprobs", "policy_versions", "ref_logprobs"):
            row[column] = (row[column] * 2)[:response_tokens]
        row["prompt"], row["response"] = "abcd" * len(row["prompt_ids"]), "abcd" * response_tokens
    return pa.Table.from_pylist(rows, schema=table.schema)


def measure() -> dict[str, Result]:
    run: dict[str, Any] = {"threads": THREADS, "worker": config(MODEL).learner}
    found = {
        name: call("tests.bench.credit:costs", MODEL, THREADS, ROUNDS, *shape, **run) for name, shape in SHAPES.items()
    }
    parts = {f"{name}_{key}": value for name, medians in found.items() for key, value in medians.items()}
    worst = {key: max(medians[key] for medians in found.values()) for key in ("time_ratio", "bytes_ratio")}
    return {
        "credit_vs_update": Result(worst["time_ratio"], "<= 0.02", parts),
        "credit_vs_journal": Result(worst["bytes_ratio"], "<= 1.2"),
    }
