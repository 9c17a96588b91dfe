"""The data that roles exchange: a `Prompt` out, a `Rollout` back, an `Experience` into the journal and the learner.

Runs anywhere. An `Experience` is one row of the Arrow table that the journal stores and the learner consumes
(common/experience_table.py). Arrays are one-dimensional and unpadded. R is the number of tokens that the policy sampled
in one response. With an environment, E more tokens of the response are the environment's (see `Turn`). Example:

    Prompt(SampleId(0, 17, 0), "2 + 2 =", token_ids=[17, 10, 17, 28], fields={"answer": "4"})
    Rollout(prompt, [19, 2], rollout_logprobs=[-0.1, -0.3], policy_versions=[5, 5], finish_reason="stop", generator="G")
    Experience(rollout, Score(1.0, {"exact": 1.0}), ref_logprobs=[-0.2, -0.3])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from common.memory import BYTES_PER_TOKEN
from common.reward_input import RewardInput as RewardInput
from common.turns import Turn as Turn
from common.turns import context_starts, response_mask

HELDOUT_EPOCH, PROBE_EPOCH = -1, -2
HANDED_OVER = "handed over"  # finish reason of a partial response that another generator will continue
IN_EPISODE = "in episode"  # finish reason of a response that the policy continues after the environment's answer
FINISHED = ("stop", "terminated")  # the finish reasons of responses that no limit cut off


class SampleId(NamedTuple):
    """The permanent name of a rollout. The same id under the same weights and run seed gives the same text."""

    epoch: int  # pass over the training prompts, from 0; HELDOUT_EPOCH: evaluation; PROBE_EPOCH: agreement check
    prompt: int  # index of the prompt in its data set
    replica: int  # number of the response to this prompt, below `rollouts_per_prompt`; not a replica of a pool

    def __str__(self) -> str:
        return f"{self.epoch}/{self.prompt}/{self.replica}"

    @classmethod
    def parse(cls, text: str) -> SampleId:
        """The inverse of `str`. Raises ValueError."""
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
    """One prompt for the policy, already tokenised."""

    sample_id: SampleId
    text: str
    token_ids: np.ndarray  # int32 [P]
    fields: Mapping[str, Any] = field(default_factory=dict)  # other fields of the record, for the reward
    messages: Sequence[Mapping[str, str]] | None = None  # with prompts.format = "chat": the input of the template


@dataclass(frozen=True)
class Rollout:
    """One response of the policy, and the weights behind each of its tokens."""

    prompt: Prompt
    response_ids: np.ndarray  # int32 [R + E], end token included when there is one
    rollout_logprobs: np.ndarray  # float32 [R] nats, of the distribution that was sampled from
    policy_versions: np.ndarray  # int32 [R], the version that sampled each token
    # "stop": an end token or a `sampling` stop ended it. "length": a limit did. HANDED_OVER, IN_EPISODE: it continues.
    # An episode that is over has "terminated", "truncated", "max_turns" or "max_tokens" (docs/environments.md).
    finish_reason: str
    generator: str  # replica that sampled it, or its last part
    turns: tuple[Turn, ...] = ()  # those that an environment has answered; () without an environment
    cached_tokens: int = 0  # of the newest turn, while it has no answer: see Turn.cached_tokens

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.token_ids) + len(self.response_ids)

    @property
    def sampled_ids(self) -> np.ndarray:
        """The tokens that the policy sampled, int32 [R]."""
        return self.response_ids[self.response_mask] if self.turns else self.response_ids

    @property
    def turn_start(self) -> int:
        """Place in the response where the newest turn of the policy begins."""
        return self.turns[-1].next_start if self.turns else 0

    @property
    def context_starts(self) -> list[int]:
        """Places in the response where a new prompt begins, in order."""
        return context_starts((turn.end, turn.new_context) for turn in self.turns)

    @property
    def context_ids(self) -> np.ndarray:
        """The tokens that the policy's next token sees, int32: the newest context so far."""
        whole = np.concatenate([self.prompt.token_ids, self.response_ids])
        return self.response_ids[starts[-1] :] if (starts := self.context_starts) else whole

    @property
    def response_mask(self) -> np.ndarray:
        """True on the tokens that the policy sampled, bool [R + E]."""
        return response_mask(len(self.response_ids), ((turn.end, turn.next_start) for turn in self.turns))


@dataclass(frozen=True)
class RolloutRef:
    """A rollout whose tokens are in another process: the few numbers that the loop needs, and a reference."""

    sample_id: SampleId
    num_tokens: int  # prompt and response
    oldest_version: int | None  # of its tokens; None without tokens
    finished: bool  # False: it continues in another generator or after the environment's answer
    fault: str = ""  # why it must not be learned from; "": no such reason
    rollout: Any = None  # the Rollout, or a reference to it

    @classmethod
    def of(cls, rollout: Rollout) -> RolloutRef:
        """The numbers of a rollout, without the reference to it."""
        finite = bool(np.isfinite(rollout.rollout_logprobs).all())
        return cls(
            rollout.prompt.sample_id,
            rollout.num_tokens,
            oldest_version(rollout.policy_versions),
            rollout.finish_reason not in (HANDED_OVER, IN_EPISODE),
            "" if finite else "the generator gave a log-probability that is not finite",
        )


class RawScore(NamedTuple):
    """The score that one reward source gives a response, before its weight."""

    score: float
    origin: str  # function, model@hash, or URL
    figures: Mapping[str, float] = {}  # other numbers that the source gave, by name


@dataclass(frozen=True)
class Score:
    """The score of a response, and the raw number from each source: `total = sum(weight * raw)`."""

    total: float
    components: Mapping[str, float]
    origins: Mapping[str, str] = field(default_factory=dict)  # by component: function, model@hash, or URL
    figures: Mapping[str, float] = field(default_factory=dict)  # other numbers from sources, under SOURCE/NAME
    judge_voids: Mapping[str, Void] = field(default_factory=dict)  # by judge that gave no score, with its reason


@dataclass(frozen=True)
class Experience:
    """A rollout with everything the learner needs to learn from it."""

    rollout: Rollout
    score: Score
    # float32 [R] nats, of the frozen reference policy at the sampling temperature. None in step 0 of a synchronous run:
    # the policy is still the reference then, and the learner's old_logprobs are used.
    ref_logprobs: np.ndarray | None


@dataclass(frozen=True)
class ExperienceRef:
    """An `Experience` whose arrays are in other processes."""

    ref: RolloutRef
    score: Score
    ref_logprobs: Any  # float32 [R] nats or a reference to them, or None as in Experience

    @property
    def num_bytes(self) -> int:
        """Approximate memory of the rollout, bytes."""
        return BYTES_PER_TOKEN * self.ref.num_tokens

    def staleness(self, policy_version: int) -> int:
        """See the function `staleness`."""
        return staleness(self.ref.oldest_version, policy_version)


def oldest_version(policy_versions: np.ndarray) -> int | None:
    """The oldest version behind a response's tokens; None without tokens."""
    return int(policy_versions.min()) if len(policy_versions) else None


def staleness(oldest: int | None, policy_version: int) -> int:
    """Versions between the weights behind a response's oldest token and `policy_version`; 0 without tokens."""
    return 0 if oldest is None else policy_version - oldest


@dataclass(frozen=True)
class ScoringError:
    """A failure of a reward source, as RUN/errors records it."""

    fault: str  # equal for all responses with the same fault
    traceback: str
    prompt: str
    response: str


@dataclass(frozen=True)
class Void:
    """Why a rollout is not learned from, or why a judge gave it no score. It never counts as a score of 0."""

    sample_id: SampleId
    reason: str
    asked_again: bool = False  # its prompt is sent again, under the same sample id
    response: str | None = None  # its text, if known
    kind: str = ""  # one of VOID_KINDS if the environment is the cause
    error: ScoringError | None = field(default=None, compare=False)  # until it is written to RUN/errors


@dataclass(frozen=True)
class PublishedBucket:
    """References to one published bucket. The driver forwards them and never fetches them."""

    full: Any  # reference to a Bucket
    best: Any  # reference to its Delta if one is smaller, else to the Bucket: for replicas with the previous version


@dataclass(frozen=True)
class Manifest:
    """The last item of a publication: bytes of each bucket, in full and in its best form."""

    full_bytes: tuple[int, ...]
    best_bytes: tuple[int, ...]
