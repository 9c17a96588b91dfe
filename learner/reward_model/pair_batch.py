"""A batch of preference pairs as model inputs: both sequences of a pair in one row. Runs in every trainer rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from common.errors import UserError
from common.model.packing import embed
from common.model.reward_scores import head_scores
from common.model.transfer import on_device
from learner.reward_model.pairs import Pair


@dataclass(frozen=True)
class PairBatch:
    """B pairs, one row each: the tokens that both sequences begin with, then both endings. Neither ending attends to
    the other.

    The shared tokens are computed once, which makes 37 % fewer tokens on HH-RLHF.
    """

    input_ids: Tensor  # int64 [B, T]
    positions: Tensor  # int64 [B, T], of each token in its own sequence
    visible: Tensor  # bool [B, 1, T, T]: token t attends to token u
    chosen_last: Tensor  # int64 [B], place of the token whose state is scored
    rejected_last: Tensor  # int64 [B]

    @classmethod
    def pad(cls, pairs: Sequence[Pair]) -> PairBatch:
        """At least one pair; rows are padded to the longest."""
        width = max(pair.num_tokens for pair in pairs)
        input_ids = torch.zeros(len(pairs), width, dtype=torch.int64)
        positions = torch.zeros_like(input_ids)
        visible = torch.ones(width, width, dtype=torch.bool).tril().repeat(len(pairs), 1, 1)
        for row, pair in enumerate(pairs):
            shared, end = len(pair.shared_ids), pair.num_tokens
            rejected = shared + len(pair.chosen_ids)  # where the second ending begins
            input_ids[row, :end] = torch.from_numpy(
                np.concatenate([pair.shared_ids, pair.chosen_ids, pair.rejected_ids])
            )
            positions[row, :rejected] = torch.arange(rejected)
            positions[row, rejected:end] = torch.arange(shared, shared + len(pair.rejected_ids))
            visible[row, rejected:, shared:rejected] = False
        lasts = [len(p.shared_ids) + len(p.chosen_ids) - 1 for p in pairs], [p.num_tokens - 1 for p in pairs]
        return cls(input_ids, positions, visible[:, None], *(torch.tensor(last) for last in lasts))

    def last_states(self, model: PreTrainedModel) -> Tensor:
        """The states that are scored, [2, B, H]: of the chosen sequences, then of the rejected."""
        device = model.device
        # An additive mask: every attention implementation takes this form.
        blocked = torch.where(on_device(self.visible, device), 0.0, torch.finfo(torch.float32).min)
        hidden = model.base_model(
            inputs_embeds=embed(model.base_model, on_device(self.input_ids, device)),
            position_ids=on_device(self.positions, device),
            attention_mask=blocked,
            use_cache=False,
        ).last_hidden_state
        rows = torch.arange(len(self.input_ids), device=device)
        lasts = on_device(self.chosen_last, device), on_device(self.rejected_last, device)
        return torch.stack([hidden[rows, last] for last in lasts])


class PairScorer(nn.Module):
    """Applies a reward model to both sides of pairs."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Scores of chosen and of rejected sequences, float32 [B]."""
        chosen, rejected = head_scores(self.model, batch.last_states(self.model))
        return chosen, rejected


@torch.no_grad()
def check_masking(model: PreTrainedModel, max_tokens: int) -> None:
    """Raises UserError for a model that ignores its mask or positions, which two endings in one row depend on.

    Such models have a sliding window shorter than a row, for example, or recurrent layers.
    """
    check_window(model.config, max_tokens)
    ids = np.arange(2 * max_tokens, dtype=np.int32) % 7 + 2
    shared = ids[: max_tokens // 2]
    ends = ids[len(shared) : max_tokens], ids[-(max_tokens - len(shared)) :]
    try:
        together = PairBatch.pad([Pair(shared, *ends)]).last_states(model)[:, 0]
    except Exception as error:  # models raise errors of any kind for a mask they do not take
        raise UserError(f"{_UNSUITED}; it fails with {type(error).__name__}: {error}") from error
    rows = (torch.from_numpy(np.concatenate([shared, end])).long()[None].to(model.device) for end in ends)
    apart = torch.cat([model.base_model(input_ids=row, use_cache=False).last_hidden_state[:, -1] for row in rows])
    if not torch.allclose(together, apart, rtol=1e-2, atol=1e-2):
        raise UserError(_UNSUITED)


def check_window(config: PretrainedConfig, max_tokens: int) -> None:
    """The part of `check_masking` that needs no weights, so that it can come before anything is written or started."""
    if (getattr(config, "sliding_window", None) or max_tokens) < max_tokens:
        raise UserError(_UNSUITED)


_UNSUITED = (
    "this model cannot read two responses in one row (a sliding window shorter than data.max_tokens, or layers that "
    "ignore the attention mask), which reward training needs; use a model with plain attention"
)
