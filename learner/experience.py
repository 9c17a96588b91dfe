"""An Arrow batch of experience, as the journal holds it, to the tensors of one update."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from common.sequences import Sequences


@dataclass(frozen=True)
class ExperienceBatch:
    """B rollouts, ready to learn from. R is the longest response; padding holds zeros."""

    sequences: Sequences
    mask: Tensor  # bool [B, R], the response mask
    rollout_logprobs: Tensor  # float32 [B, R] nats
    ref_logprobs: Tensor  # float32 [B, R] nats
    scores: Tensor  # float64 [B]: hundreds of millions keep their small differences

    @classmethod
    def from_table(cls, table: pa.Table) -> ExperienceBatch:
        """Rows in the table's order."""
        sequences = Sequences.pad(_arrays(table, "prompt_ids"), _arrays(table, "response_ids"))
        return cls(
            sequences,
            sequences.response_mask,
            sequences.scatter(_flat(table, "rollout_logprobs")),
            sequences.scatter(_flat(table, "ref_logprobs")),
            torch.tensor(table["score"].to_numpy(), dtype=torch.float64),
        )


def _arrays(table: pa.Table, name: str) -> list[np.ndarray]:
    return [row.values.to_numpy() for row in table[name]]


def _flat(table: pa.Table, name: str) -> Tensor:
    return torch.from_numpy(table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32))
