"""A run directory as `ratchet train` leaves it, written by hand: journal, credit files, metrics, evaluations, events.

The numbers of tokens are plausible, and made from a seed: values that rise, one score at the end, ratios near 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from common.credit_table import DERIVED_SCHEMA
from common.experience_table import EXPERIENCE_SCHEMA, experience_table
from common.files import append_record, sha256, write_json
from common.types import Experience, Prompt, Rollout, SampleId, Score, Turn
from deploy.run.record import write_first_record
from learner.loop.credit import write_credit
from learner.loop.journal import JournalStep
from tests.critic_figures import PARTS
from tests.fakes import WORDS, as_episode, save_tiny_tokenizer, tiny_config


def write_run(
    directory: Path,
    *,
    steps: int = 6,
    rollouts: int = 8,
    prompts: int = 20,
    tokens: tuple[int, int] = (2, 9),
    credit: bool = True,
    clip_share: float = 0.1,
    prompt: str = "ask a1 b2",
    voids: Sequence[tuple[str, str, str | None]] = (),
    finished: bool = True,
    turns: int = 0,
    info: str = '{"tool_calls": 1}',
    last: Sequence[Mapping[str, str]] = (),
    scale: float = 1.0,
    seed: int = 0,
) -> Path:
    """Writes the run. `voids` are in the journal's step 1. With `turns`, every second response is an episode of at most
    so many, the first of them with this `info`. The environment answers the last turn with the messages `last`.
    `scale` multiplies the scores."""
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True)
    cfg = tiny_config("tests/tiny", num_steps=max(1, steps), rollouts_per_step=rollouts)
    (directory / "config.toml").write_text(cfg.to_toml())
    write_first_record(directory, "train")
    save_tiny_tokenizer(directory / "tokenizer")
    (directory / "tokenizer/tokenizer.json").rename(directory / "tokenizer.json")
    asked = 0
    for step in range(steps):
        rows = []
        for _ in range(rollouts):
            sample = SampleId(asked // prompts, asked % prompts, 0)
            row = _experience(rng, sample, f"{prompt} {sample.prompt}", step, tokens, scale)
            rows.append(_episode(rng, row, turns, info, last) if turns and asked % 2 else row)
            asked += 1
        path = write_step(directory, step, rows, voids=voids if step == 1 else ())
        if credit:
            write_made_credit(directory, step, rows, path, rng, clip_share=clip_share)
        append_record(directory / "metrics.jsonl", _record(step, rows, rng))
    for version in (0, steps):
        append_record(directory / "evaluations.jsonl", _evaluation(version, version / max(1, steps)))
    death = {"time": 1001.5, "replica": "Generator(0)", "event": "died", "reason": "killed <b>by</b> 9"}
    append_record(directory / "pool-events.jsonl", death)
    if finished:
        write_json(directory / "summary.json", {"num_steps": steps})
    return directory


def write_step(
    directory: Path, step: int, rows: Sequence[Experience], *, voids: Sequence[tuple[str, str, str | None]] = ()
) -> Path:
    """The journal's file of a step, with the text of each response."""
    table = experience_table(rows, step=step, decode=lambda lists: [" ".join(WORDS[i] for i in ids) for ids in lists])
    about = {"schema": 7, "step": step, "time": 1000.0 + step, "policy_version": step, "prompts": {}, "previous": ""}
    about["voids"] = [list(void) for void in voids]
    path = directory / f"journal/step-{step:06d}.arrow"
    path.parent.mkdir(exist_ok=True)
    with pa.ipc.new_file(str(path), EXPERIENCE_SCHEMA.with_metadata({"ratchet": json.dumps(about)})) as writer:
        writer.write_table(table)
    return path


def write_made_credit(
    directory: Path,
    step: int,
    rows: Sequence[Experience],
    journal: Path,
    rng: np.random.Generator,
    *,
    clip_share: float = 0.1,
    gamma: float = 1.0,
) -> None:
    """The credit file of a step. TD errors, returns and the whitened advantages follow from the other numbers."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in DERIVED_SCHEMA.names}
    for row in rows:
        for name, values in _derived(row, rng, clip_share=clip_share, gamma=gamma).items():
            columns[name].append(values)
    every = np.concatenate(columns["advantages"])
    columns["whitened_advantages"] = [(a - every.mean()) / (every.std() + 1e-8) for a in columns["advantages"]]
    arrays = [pa.array(columns[field.name], type=field.type) for field in DERIVED_SCHEMA]
    entry = JournalStep(step, experience_table(rows, step=step), step, {}, (), 0.0)
    derived = pa.Table.from_arrays(arrays, schema=DERIVED_SCHEMA)
    write_credit(directory / "credit", entry, derived, journal=sha256(journal))


def _derived(row: Experience, rng: np.random.Generator, *, clip_share: float, gamma: float) -> dict[str, np.ndarray]:
    """The numbers of one response, but for the whitened advantages."""
    length, logprobs = len(row.rollout.rollout_logprobs), row.rollout.rollout_logprobs
    kl = logprobs - row.ref_logprobs if row.ref_logprobs is not None else np.zeros(length)
    rewards, ends = -0.05 * kl, np.arange(length) == length - 1
    for turn in row.rollout.turns:
        if turn.ends:
            ends[int(row.rollout.response_mask[: turn.end].sum()) - 1] = True
    rewards[ends] += row.score.total
    values = np.linspace(0.2, row.score.total, length) + rng.normal(0, 0.1, length)
    td_errors = rewards + gamma * np.where(ends, 0, np.append(values[1:], 0)) - values
    decay, after = (0.95 * gamma) ** np.arange(length), np.flatnonzero(ends) + 1
    last = [int(after[after > t][0]) for t in range(length)]
    advantages = np.array([decay[: last[t] - t] @ td_errors[t : last[t]] for t in range(length)])
    clipped = rng.random(length) < clip_share
    return {
        "values": values,
        "kl": kl,
        "rewards": rewards,
        "td_errors": td_errors,
        "advantages": advantages,
        "returns": advantages + values,
        "entropy": rng.gamma(1.0, 0.5, length),
        "old_logprobs": logprobs + rng.normal(0, 0.01, length),
        "importance_weight": np.ones(length),
        "ratio": np.where(clipped, 1.08, 1 + rng.normal(0, 0.01, length)),
        "clipped": clipped,
        "ends": ends,
    }


def _experience(
    rng: np.random.Generator, sample: SampleId, prompt: str, version: int, tokens: tuple[int, int], scale: float
) -> Experience:
    length = int(rng.integers(*tokens))
    cut = bool(rng.random() < 0.2)
    ids = np.append(rng.integers(4, len(WORDS), length - 1), 4 if cut else 1).astype(np.int32)
    logprobs = -rng.gamma(1.0, 1.0, length).astype(np.float32)
    reference = logprobs - rng.normal(0.02 * version, 0.1, length).astype(np.float32)
    rollout = Rollout(
        Prompt(sample, prompt, np.array([3], np.int32), {}),
        ids,
        logprobs,
        np.full(length, version, np.int32),
        "length" if cut else "stop",
        "Generator(0)",
    )
    score = scale * float(np.round(rng.normal(0.05 * version, 1), 3))
    return Experience(rollout, Score(score, {"a_words": score}), reference)


def _episode(
    rng: np.random.Generator, row: Experience, most: int, info: str, last: Sequence[Mapping[str, str]]
) -> Experience:
    """The same response in turns. The environment answers each turn but the last with one or two of its tokens."""
    length = len(row.rollout.response_ids)
    count = int(rng.integers(1, most + 1))
    ends = np.sort(rng.choice(np.arange(1, length - 2), count - 1, replace=False)).tolist()
    turns = []
    for number, end in enumerate(ends):
        after = ends[number + 1] if number + 1 < len(ends) else length - 1
        said = min(int(rng.integers(1, 3)), after - end)
        reward = round(float(rng.normal()), 2)
        turn = Turn(end, end + said, reward, info=info if number == 0 else "{}")
        turns.append(replace(turn, new_context=number == 1, ends=number == 1 and count % 2 == 0))
    turns.append(Turn(length, length, 1.0, observation=json.dumps(list(last))))
    return as_episode(replace(row, rollout=replace(row.rollout, finish_reason="terminated")), *turns)


def _record(step: int, rows: Sequence[Experience], rng: np.random.Generator) -> dict[str, Any]:
    scores = np.array([row.score.total for row in rows])
    return {
        "step": step,
        "time": 1000.0 + step + 0.9,
        "rollout/score/mean": scores.mean(),
        "rollout/score/std": scores.std(),
        "reward/a_words/score": scores.mean(),
        "kl/per_response": 0.1 * step,
        "ppo/entropy": 2 - 0.01 * step,
        "value/explained_variance": float(rng.random()),
        "value/returns_var/realised": 1.0 if step < 3 else 0.2,
        **{f"value/explained_variance/{part}": 0.1 * step - 0.05 * place for place, part in enumerate(PARTS)},
        "value/calibration_error": 0.2,
        "value/score_correlation": 0.1 * step,
        "time/learn_s": 1 + float(rng.random()),
    }


def _evaluation(version: int, done: float) -> dict[str, Any]:
    return {
        "policy_version": version,
        "prompts": 8,
        "voids": 0,
        "void_reason": "",
        "pass_at_1": 0.25 + 0.5 * done,
        "interval": [0.1 + 0.5 * done, 0.4 + 0.5 * done],
        "score": done,
        "components": {"a_words": done, "judge": 1 - done},
        "kl_per_response": 3 * done,
        "response_tokens": 5.0,
        "distinct_1": 0.5,
        "distinct_2": 0.9,
    }
