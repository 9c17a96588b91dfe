"""An Arrow batch of experience, as the journal holds it, to the tensors of one update."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from common.model.packing import Sequences
from common.model.size import ModelSize


@dataclass(frozen=True)
class ExperienceBatch:
    """B rollouts, ready to learn from. R is the longest response; padding holds zeros."""

    sequences: Sequences
    mask: Tensor  # bool [B, R], the response mask
    rollout_logprobs: Tensor  # float32 [B, R] nats
    ref_logprobs: Tensor  # float32 [B, R] nats
    by_reference: Tensor  # bool [B], True: the reference itself wrote this, and its log-probabilities are the policy's
    scores: Tensor  # float64 [B]: hundreds of millions keep their small differences

    @classmethod
    def from_table(cls, table: pa.Table) -> ExperienceBatch:
        """Rows in the table's order."""
        sequences = Sequences.pack(arrays(table, "prompt_ids"), arrays(table, "response_ids"))
        mask = sequences.response_mask
        by_reference = torch.from_numpy(table["ref_logprobs"].is_null().to_numpy())
        measured = mask & ~by_reference[:, None]
        return cls(
            sequences,
            mask,
            sequences.scatter(_flat(table, "rollout_logprobs")),
            torch.zeros(mask.shape).masked_scatter(measured, _flat(table, "ref_logprobs")),
            by_reference,
            torch.tensor(table["score"].to_numpy(), dtype=torch.float64),
        )


def estimated_costs(sequences: Sequences, size: ModelSize) -> list[int]:
    """Of each sequence, about how many floating-point operations its forward pass takes: two for every weight and
    token, with the head's only for response tokens, and attention's, which grow with the square of the length."""
    tokens, answered = sequences.lengths.double(), sequences.response_lengths.double()
    head = size.vocabulary * size.hidden
    attention = 2 * size.layers * size.heads * size.head_dim
    costs = 2 * (size.parameters - head) * tokens + 2 * head * answered + attention * tokens**2
    return costs.long().tolist()


def arrays(table: pa.Table, name: str) -> list[np.ndarray]:
    """Of a column of lists each row's own."""
    return [row.values.to_numpy() for row in table[name]]


def _flat(table: pa.Table, name: str) -> Tensor:
    return torch.from_numpy(table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32))
