"""How an update divided each score among the tokens. For people: learning does not use it.

Runs in every learner rank. common/credit_table.py has the columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from common.config.ppo import PPOConfig
from common.credit_table import DERIVED_SCHEMA
from common.model.transfer import on_device
from learner.ppo.advantages import td_errors
from learner.ppo.losses import POLICY_LOSSES, probability_ratio
from learner.ppo.targets import Derivation, Targets


class NewestPass:
    """The log-probabilities of the newest pass with gradients over each row and, if asked for, the entropy of the first
    pass. They stay on the device until `read` copies all of them, once in a step: each copy to the host waits for the
    device."""

    def __init__(self, shape: torch.Size, device: torch.device, *, entropy: bool = False) -> None:
        self._logprobs = torch.zeros(shape, device=device)
        self._entropy = torch.zeros(shape, device=device) if entropy else None
        self._reached = np.zeros(shape[0], dtype=np.bool_)
        self.first = True  # the rows of the minibatch have had no pass before

    def begin(self, rows: np.ndarray) -> None:
        """Begins a minibatch: its rows become zero on every rank. Otherwise, a rank that had a row in the epoch before
        would add its old values to the sum over ranks."""
        self.first = not self._reached[rows].any()
        self._reached[rows] = True
        self._logprobs.index_fill_(0, on_device(torch.from_numpy(rows), self._logprobs.device), 0.0)

    @property
    def reached(self) -> Tensor:
        """Rows that had a pass, bool [B]."""
        return torch.from_numpy(self._reached)

    def add(self, rows: Tensor, logprobs: Tensor, entropy: Tensor) -> None:
        """Takes the outputs [b, r] of one micro-batch of this rank."""
        places = on_device(rows, self._logprobs.device)
        self._logprobs[:, : logprobs.shape[1]].index_copy_(0, places, logprobs.detach())
        if self.first and self._entropy is not None:
            self._entropy[:, : entropy.shape[1]].index_copy_(0, places, entropy.detach())

    def read(self) -> Tensor:
        """Log-probabilities and, if asked for, entropy: [1 or 2, B, R] on the CPU, zeros in rows of other ranks."""
        return torch.stack([x for x in (self._logprobs, self._entropy) if x is not None]).cpu()


@dataclass(frozen=True)
class Credit:
    """The results of one update for each token. Tensors are [B, R] and on the CPU, except those in `newest`."""

    fixed: Targets
    derivation: Derivation
    entropy: Tensor | None  # of the policy before the update, nats; None: the first pass over each row gave it
    newest: NewestPass
    ppo: PPOConfig

    def table(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> pa.Table:
        """The table of DERIVED_SCHEMA, rows in the order of the batch. Every rank must call it at the same time."""
        fixed, ppo, mask = self.fixed, self.ppo, self.fixed.mask
        reached = mask & self.newest.reached[:, None]
        logprobs, *first_entropy = sum_over_ranks(self.newest.read())
        ratio = probability_ratio(logprobs, fixed.base_logprobs, reached)
        _, dropped = POLICY_LOSSES[ppo.policy_loss](ratio, fixed.advantages, bounds=ppo.ratio_bounds)
        columns = {
            "values": fixed.old_values if ppo.has_critic else None,
            "kl": self.derivation.kl,
            "rewards": self.derivation.rewards,
            "td_errors": self._td_errors() if ppo.has_critic else None,
            "advantages": self.derivation.advantages,
            "whitened_advantages": fixed.advantages if ppo.whiten_advantages else None,
            "returns": fixed.returns,
            "entropy": first_entropy[0] if self.entropy is None else self.entropy,
            "old_logprobs": None if ppo.ratio_to_sampler else fixed.base_logprobs,
            "importance_weight": fixed.importance,
            "ratio": ratio,
            "clipped": dropped,
            "ends": self.derivation.ends,
        }
        rows = dict.fromkeys(("ratio", "clipped"), self.newest.reached)
        if self.entropy is None:
            rows["entropy"] = self.newest.reached
        arrays = [
            pa.nulls(len(mask), field.type)
            if (values := columns[field.name]) is None
            else _lists(values, mask, rows.get(field.name))
            for field in DERIVED_SCHEMA
        ]
        return pa.Table.from_arrays(arrays, schema=DERIVED_SCHEMA)

    def _td_errors(self) -> Tensor:
        found, mask = self.derivation, self.fixed.mask
        return td_errors(found.rewards, self.fixed.old_values, mask, gamma=self.ppo.gamma, ends=found.ends)


def _lists(values: Tensor, mask: Tensor, rows: Tensor | None) -> pa.ListArray:
    """The values of each row where the mask is True; null for a row that `rows` leaves out."""
    shown = mask if rows is None else mask & rows[:, None]
    ends = shown.sum(1).cumsum(0).to(torch.int32).numpy()
    offsets = np.concatenate([np.zeros(1, np.int32), ends])
    null = None if rows is None else pa.array(~rows.numpy())
    return pa.ListArray.from_arrays(offsets, pa.array(values[shown].numpy()), mask=null)
