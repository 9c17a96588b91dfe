"""What travels between roles: a `Prompt` out, a `Rollout` back, an `Experience` into the journal and the learner.

An `Experience` is one row of the Arrow table that the journal stores and the learner consumes; the table's schema
stands at the end of this file. Arrays are one-dimensional and unpadded: R is this response's own length.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from common.reward_input import RewardInput as RewardInput

HELDOUT_EPOCH = -1
PROBE_EPOCH = -2
HANDED_OVER = "handed over"  # finish reason of what a generator began and another one is to finish
# About what a token takes while its rollout waits for the learner: id, two log-probabilities, version, text.
BYTES_PER_TOKEN = 20


class SampleId(NamedTuple):
    """Names one rollout for ever: the same id under the same weights and run seed is the same text."""

    epoch: int  # pass over the training prompts, from 0; HELDOUT_EPOCH for evaluation, PROBE_EPOCH for a check
    prompt: int  # index of the prompt in its data set
    replica: int  # which of the prompt's `rollouts_per_prompt` responses

    def __str__(self) -> str:
        return f"{self.epoch}/{self.prompt}/{self.replica}"

    @classmethod
    def parse(cls, text: str) -> SampleId:
        epoch, prompt, replica = text.split("/")
        return cls(int(epoch), int(prompt), int(replica))


@dataclass(frozen=True)
class PromptRecord:
    """One loaded prompt, tokenised, which has no sample id yet."""

    text: str
    token_ids: np.ndarray  # int32 [P]
    fields: dict[str, Any]  # of the record, for the reward
    messages: list[dict[str, Any]] | None = None  # with prompts.format = "chat": the input of the template


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
    finish_reason: str  # "stop": the end token was written; "length": cut off; HANDED_OVER
    generator: str  # replica that wrote it, its end at least

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.token_ids) + len(self.response_ids)


@dataclass(frozen=True)
class RolloutRef:
    """What the loop knows of a rollout whose tokens lie elsewhere: a few numbers, and where it is."""

    sample_id: SampleId
    num_tokens: int  # prompt and response
    oldest_version: int | None  # of its tokens; None without tokens
    finished: bool  # False: its generator had to leave, and another goes on with it
    fault: str = ""  # why nobody may learn from it
    rollout: Any = None  # the Rollout, or a reference to it

    @classmethod
    def of(cls, rollout: Rollout) -> RolloutRef:
        """All but where it is."""
        finite = bool(np.isfinite(rollout.rollout_logprobs).all())
        return cls(
            rollout.prompt.sample_id,
            rollout.num_tokens,
            oldest_version(rollout.policy_versions),
            rollout.finish_reason != HANDED_OVER,
            "" if finite else "the generator gave a log-probability that is not finite",
        )


class RawScore(NamedTuple):
    """The score that one reward source gives a response, before its weight."""

    score: float
    origin: str  # what gave it: function, model@hash, or URL
    figures: Mapping[str, float] = {}  # further numbers that the source gave, by name


@dataclass(frozen=True)
class Score:
    """A response's score with the raw number each source gave it: `total = sum(weight * raw)`."""

    total: float
    components: Mapping[str, float]
    origins: Mapping[str, str] = field(default_factory=dict)  # of each component: function, model@hash, or URL
    figures: Mapping[str, float] = field(default_factory=dict)  # what else sources said, under SOURCE/NAME


@dataclass(frozen=True)
class Experience:
    """A rollout with everything the learner needs to learn from it."""

    rollout: Rollout
    score: Score
    # float32 [R] nats, frozen reference policy at the sampling temperature; None: the policy that learns from this in
    # step 0 still is the reference, and computes them itself.
    ref_logprobs: np.ndarray | None


@dataclass(frozen=True)
class ExperienceRef:
    """An `Experience` whose arrays lie elsewhere."""

    written: RolloutRef
    score: Score
    ref_logprobs: Any  # float32 [R] nats or a reference to them, or None as in Experience

    @property
    def num_bytes(self) -> int:
        """About what it takes in memory."""
        return BYTES_PER_TOKEN * self.written.num_tokens

    def staleness(self, policy_version: int) -> int:
        return staleness(self.written.oldest_version, policy_version)


def oldest_version(policy_versions: np.ndarray) -> int | None:
    """Of a response's tokens; None without tokens."""
    return int(policy_versions.min()) if len(policy_versions) else None


def staleness(oldest: int | None, policy_version: int) -> int:
    """Versions between the weights behind a response's oldest token and `policy_version`; 0 without tokens."""
    return 0 if oldest is None else policy_version - oldest


@dataclass(frozen=True)
class ScoringError:
    """What a reward source failed on, for RUN/errors."""

    fault: str  # the same for every answer that meets the same fault
    traceback: str
    prompt: str
    response: str


@dataclass(frozen=True)
class Void:
    """A rollout that will not be trained on, and why. It is recorded, counted, and never becomes a zero."""

    sample_id: SampleId
    reason: str
    asked_again: bool = False  # its prompt goes out once more, under the same sample id
    response: str | None = None  # its text, where that is known
    error: ScoringError | None = field(default=None, compare=False)  # until it is written down


# How a rollout's response tokens become text, many rollouts at once.
Decode = Callable[[Sequence[np.ndarray]], Sequence[str]]

EXPERIENCE_SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("epoch", pa.int32()),
        ("prompt_index", pa.int32()),
        ("replica", pa.int32()),
        ("prompt", pa.string()),
        ("response", pa.string()),  # decoded without special tokens, to be read; learning uses response_ids alone
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
        ("figures", pa.map_(pa.string(), pa.float64())),  # what else sources said, under SOURCE/NAME
        ("ref_logprobs", pa.list_(pa.float32())),  # null: see Experience
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
    ]
    arrays = [pa.array(values, type=column.type) for values, column in zip(columns, EXPERIENCE_SCHEMA)]
    return pa.Table.from_arrays(arrays, schema=EXPERIENCE_SCHEMA)
