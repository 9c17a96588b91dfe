"""Converts a batch, an Arrow table as in the journal, to the tensors of one update.

Runs in every learner rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from common.experience_table import response_masks, turn_rows
from common.model.masking import last_places
from common.model.packing import Sequences
from common.turns import context_starts


@dataclass(frozen=True)
class ExperienceBatch:
    """B rollouts, ready to learn from. R is the longest response, without tokens of an environment; padding holds
    zeros."""

    sequences: Sequences
    mask: Tensor  # bool [B, R], the response mask
    rollout_logprobs: Tensor  # float32 [B, R] nats
    ref_logprobs: Tensor  # float32 [B, R] nats
    ref_is_policy: Tensor  # bool [B]: the policy still is the reference, so its log-probabilities are ref_logprobs
    scores: Tensor  # float64 [B]: scores of hundreds of millions keep their small differences
    groups: Tensor  # int64 [B], equal for responses to one prompt in one pass over the prompts
    turn_rewards: Tensor  # float32 [B, R], an environment's reward for a turn on the turn's last token
    ends: Tensor  # bool [B, R], True on the last token of each sequence: of the response, and of turns that end one

    @classmethod
    def from_table(cls, table: pa.Table) -> ExperienceBatch:
        """Keeps the table's order of rows."""
        masks, turns = response_masks(table), turn_rows(table)
        starts = [context_starts((turn["end"], turn["new_context"]) for turn in row) for row in turns]
        sequences = Sequences.pack(arrays(table, "prompt_ids"), arrays(table, "response_ids"), masks, starts)
        mask = sequences.response_mask
        ref_is_policy = torch.from_numpy(table["ref_logprobs"].is_null().to_numpy())
        measured = mask & ~ref_is_policy[:, None]
        epochs, prompts = (table[name].to_numpy().astype(np.int64) for name in ("epoch", "prompt_index"))
        return cls(
            sequences,
            mask,
            sequences.scatter(_flat(table, "rollout_logprobs")),
            torch.zeros(mask.shape).masked_scatter(measured, _flat(table, "ref_logprobs")),
            ref_is_policy,
            torch.tensor(table["score"].to_numpy(), dtype=torch.float64),
            torch.from_numpy((epochs << 32) + prompts),  # both are int32 in the table
            *_of_turns(turns, masks, mask),
        )


def _of_turns(
    turns: Sequence[Sequence[Mapping[str, Any]]], masks: Sequence[np.ndarray], mask: Tensor
) -> tuple[Tensor, Tensor]:
    """The rewards of turns, and the ends of sequences, [B, R]. `masks`: of the whole responses."""
    rewards, ends = torch.zeros(mask.shape), last_places(mask)
    for row, (found, whole) in enumerate(zip(turns, masks, strict=True)):
        for turn in found:
            if (sampled := int(whole[: turn["end"]].sum())) > 0:
                rewards[row, sampled - 1] += turn["reward"]
                ends[row, sampled - 1] |= turn["ends"]
    return rewards, ends


def arrays(table: pa.Table, name: str) -> list[np.ndarray]:
    """The list of each row in a column of lists."""
    return [row.values.to_numpy() for row in table[name]]


def _flat(table: pa.Table, name: str) -> Tensor:
    """All lists of a column of lists, one after another."""
    return torch.from_numpy(table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32))
