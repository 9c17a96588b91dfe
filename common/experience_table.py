"""The Arrow table of a batch: one row for each rollout. Runs in the driver and in every learner rank."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from common.turns import response_mask
from common.types import Experience

# Turns the tokens of many responses into texts.
Decode = Callable[[Sequence[np.ndarray]], Sequence[str]]


# The fields of `Turn`.
TURNS = pa.list_(
    pa.struct(
        [
            ("end", pa.int32()),
            ("next_start", pa.int32()),
            ("reward", pa.float64()),
            ("observation", pa.string()),
            ("info", pa.string()),
            ("seconds", pa.float64()),
            ("cached_tokens", pa.int32()),
            ("new_context", pa.bool_()),
            ("ends", pa.bool_()),
        ]
    )
)

EXPERIENCE_SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("epoch", pa.int32()),
        ("prompt_index", pa.int32()),
        ("replica", pa.int32()),
        ("prompt", pa.string()),
        ("response", pa.string()),  # for people, without special tokens; learning uses only response_ids
        ("fields", pa.string()),  # JSON
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.int32())),
        ("rollout_logprobs", pa.list_(pa.float32())),
        ("policy_versions", pa.list_(pa.int32())),
        ("finish_reason", pa.dictionary(pa.int8(), pa.string())),
        ("generator", pa.dictionary(pa.int16(), pa.string())),
        ("score", pa.float64()),
        ("components", pa.map_(pa.string(), pa.float64())),
        ("origins", pa.map_(pa.string(), pa.string())),
        ("figures", pa.map_(pa.string(), pa.float64())),  # other numbers from sources, under SOURCE/NAME
        ("ref_logprobs", pa.list_(pa.float32())),  # null: see Experience
        ("turns", TURNS),  # null without an environment
    ]
)


def experience_table(rows: Sequence[Experience], *, step: int = 0, decode: Decode | None = None) -> pa.Table:
    """Rows in the given order as one Arrow table of EXPERIENCE_SCHEMA. Without `decode`, responses are null."""
    rollouts = [row.rollout for row in rows]
    responses = decode([rollout.response_ids for rollout in rollouts]) if decode and rows else [None] * len(rows)
    ids = [rollout.prompt.sample_id for rollout in rollouts]
    columns = [
        [step] * len(rows),
        [i.epoch for i in ids],
        [i.prompt for i in ids],
        [i.replica for i in ids],
        [r.prompt.text for r in rollouts],
        responses,
        [json.dumps(dict(r.prompt.fields), sort_keys=True) for r in rollouts],
        [r.prompt.token_ids for r in rollouts],
        [r.response_ids for r in rollouts],
        [r.rollout_logprobs for r in rollouts],
        [r.policy_versions for r in rollouts],
        [r.finish_reason for r in rollouts],
        [r.generator for r in rollouts],
        [row.score.total for row in rows],
        [list(row.score.components.items()) for row in rows],
        [list(row.score.origins.items()) for row in rows],
        [list(row.score.figures.items()) for row in rows],
        [row.ref_logprobs for row in rows],
        [[asdict(turn) for turn in r.turns] or None for r in rollouts],
    ]
    arrays = [pa.array(values, type=column.type) for values, column in zip(columns, EXPERIENCE_SCHEMA)]
    return pa.Table.from_arrays(arrays, schema=EXPERIENCE_SCHEMA)


def turn_rows(table: pa.Table) -> list[list[dict[str, Any]]]:
    """The turns of each row of a table, with the fields of `Turn`; empty without an environment."""
    return [turns or [] for turns in table["turns"].to_pylist()]


def response_masks(table: pa.Table) -> list[np.ndarray]:
    """True on the tokens that the policy sampled, bool [R + E] for each row of a table with `response_ids` and
    `turns`."""
    return [
        response_mask(len(ids), ((turn["end"], turn["next_start"]) for turn in turns or ()))
        for ids, turns in zip(table["response_ids"], table["turns"].to_pylist(), strict=True)
    ]
