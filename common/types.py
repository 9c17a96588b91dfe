"""What travels between roles: a `Prompt` out, a `Rollout` back, an `Experience` into the journal and the learner.

An `Experience` is one row of the Arrow table that the journal stores and the learner consumes; the table's schema
stands at the end of this file. Arrays are one-dimensional and unpadded: R is this response's own length.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

HELDOUT_EPOCH = -1


class SampleId(NamedTuple):
    """Names one rollout for ever: the same id under the same weights and run seed is the same text."""

    epoch: int  # pass over the training prompts, from 0; HELDOUT_EPOCH for evaluation
    prompt: int  # index of the prompt in its data set
    replica: int  # which of the prompt's `rollouts_per_prompt` responses

    def __str__(self) -> str:
        return f"{self.epoch}/{self.prompt}/{self.replica}"

    @classmethod
    def parse(cls, text: str) -> SampleId:
        epoch, prompt, replica = text.split("/")
        return cls(int(epoch), int(prompt), int(replica))


@dataclass(frozen=True)
class Prompt:
    """One question to the policy, already tokenised."""

    sample_id: SampleId
    text: str
    token_ids: np.ndarray  # int32 [P]
    fields: Mapping[str, Any] = field(default_factory=dict)  # the record's other fields, for the reward
    messages: Sequence[Mapping[str, str]] | None = None  # with prompts.format = "chat": what the template was given


@dataclass(frozen=True)
class Rollout:
    """What the policy wrote, and under which weights."""

    prompt: Prompt
    response_ids: np.ndarray  # int32 [R], end token included when there is one
    rollout_logprobs: np.ndarray  # float32 [R] nats, of the distribution really sampled from
    policy_versions: np.ndarray  # int32 [R], the version that sampled each token
    finish_reason: str  # "stop": the end token was written; "length": cut off
    generator: str  # replica that wrote it

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.token_ids) + len(self.response_ids)


@dataclass(frozen=True)
class RewardInput:
    """What a reward function is given: `def reward(answer: RewardInput) -> float`."""

    prompt: str
    response: str  # decoded, without special tokens
    response_tokens: int  # end token included
    finish_reason: str  # "stop" or "length"
    fields: Mapping[str, Any]  # the prompt record's other fields, such as a reference answer
    messages: Sequence[Mapping[str, str]] | None = None  # the prompt as chat messages, if it was


@dataclass(frozen=True)
class Score:
    """A response's score with the raw number each source gave it: `total = sum(weight * raw)`."""

    total: float
    components: Mapping[str, float]
    origins: Mapping[str, str] = field(default_factory=dict)  # of each component: function, model@hash, or URL


@dataclass(frozen=True)
class Experience:
    """A rollout with everything the learner needs to learn from it."""

    rollout: Rollout
    score: Score
    # float32 [R] nats, frozen reference policy at the sampling temperature; None: the policy that learns from this in
    # step 0 still is the reference, and computes them itself.
    ref_logprobs: np.ndarray | None

    @property
    def num_bytes(self) -> int:
        """About what it takes in memory."""
        rollout, text = self.rollout, len(self.rollout.prompt.text)
        arrays = (rollout.prompt.token_ids, rollout.response_ids, rollout.rollout_logprobs, rollout.policy_versions)
        return text + sum(array.nbytes for array in arrays) + rollout.rollout_logprobs.nbytes

    def staleness(self, policy_version: int) -> int:
        return staleness(self.rollout.policy_versions, policy_version)


def staleness(policy_versions: np.ndarray, policy_version: int) -> int:
    """Versions between the weights behind a response's oldest token and `policy_version`; 0 without tokens."""
    return policy_version - int(policy_versions.min(initial=policy_version))


@dataclass(frozen=True)
class Void:
    """A rollout that will not be trained on, and why. It is recorded, counted, and never becomes a zero."""

    sample_id: SampleId
    reason: str
    asked_again: bool = False  # its prompt goes out once more, under the same sample id


EXPERIENCE_SCHEMA = pa.schema(
    [
        ("epoch", pa.int32()),
        ("prompt_index", pa.int32()),
        ("replica", pa.int32()),
        ("prompt", pa.string()),
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
        ("ref_logprobs", pa.list_(pa.float32())),  # null: see Experience
    ]
)


def experience_table(rows: Sequence[Experience]) -> pa.Table:
    """Rows in the given order as one Arrow table of EXPERIENCE_SCHEMA."""
    rollouts = [row.rollout for row in rows]
    ids = [rollout.prompt.sample_id for rollout in rollouts]
    columns = [
        [i.epoch for i in ids],
        [i.prompt for i in ids],
        [i.replica for i in ids],
        [r.prompt.text for r in rollouts],
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
        [row.ref_logprobs for row in rows],
    ]
    arrays = [pa.array(values, type=column.type) for values, column in zip(columns, EXPERIENCE_SCHEMA)]
    return pa.Table.from_arrays(arrays, schema=EXPERIENCE_SCHEMA)
