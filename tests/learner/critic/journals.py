"""Journals for the tests of `ratchet train-critic`: hand-made rollouts whose scores depend on their tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from common.experience_table import experience_table
from common.types import Experience, Prompt, SampleId
from learner.loop.journal import Journal
from tests.fakes import as_episode, make_experience, random_turns

PROMPTS = 12


def rollout(index: int, seed: int, *, prompts: int = PROMPTS, reference: bool = True) -> Experience:
    """A response of 1 to 7 tokens, all of one kind but the last. Its score depends on the kind, and a little on the
    prompt."""
    rng = np.random.default_rng([seed, index])
    kind, number = rng.integers(2), index % prompts
    response = [*rng.integers(4 + 28 * kind, 32 + 28 * kind, rng.integers(0, 7)).tolist(), 1]
    score = float(kind + 0.2 * number / prompts + 0.1 * rng.normal())
    row = make_experience(index, response, score=score)
    ids = np.array([3, 4 + number, 40 + number][: 2 + index % 2], dtype=np.int32)
    prompt = Prompt(SampleId(0, number, index), f"prompt {number}", ids, {})
    logprobs = rng.normal(-3, 1, (2, len(response))).astype(np.float32)
    return replace(
        row,
        rollout=replace(row.rollout, prompt=prompt, rollout_logprobs=logprobs[0]),
        ref_logprobs=logprobs[1] if reference else None,
    )


def step_table(step: int, seed: int = 0, *, count: int = 8, **about: Any) -> pa.Table:
    """The rollouts of one step. Those of the first have no reference log-probabilities."""
    return experience_table([rollout(step * count + i, seed, reference=step > 0, **about) for i in range(count)])


def context_table(step: int) -> pa.Table:
    """Twelve episodes, whose environment began new contexts."""
    rng = np.random.default_rng(step)
    rows = []
    for index in range(12 * step, 12 * step + 12):
        turns = random_turns(rng, index % 4, contexts=True)
        made = rollout(index, 0)
        extra = (turns[-1].next_start if turns else 0) + 2 - len(made.rollout.response_ids)
        ids = [*rng.integers(4, 60, max(0, extra)), *made.rollout.response_ids]
        logprobs, refs = rng.normal(-3, 1, (2, len(ids))).astype(np.float32)
        whole = replace(made.rollout, response_ids=np.array(ids, np.int32), rollout_logprobs=logprobs)
        whole = replace(whole, policy_versions=np.zeros(len(ids), np.int32))
        rows.append(as_episode(replace(made, rollout=whole, ref_logprobs=refs), *turns))
    return experience_table(rows)


def write_journal(run: Path, tables: list[pa.Table], *, begin: dict[str, Any] | None = None) -> Journal:
    """A run directory with nothing but a journal."""
    journal = Journal(run / "journal")
    journal.open_for_writing()
    if begin is not None:
        journal.note("begin", **begin)
    for step, table in enumerate(tables):
        journal.append(table, policy_version=step, prompts={})
    return journal
