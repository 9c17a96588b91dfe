"""Scores of token sequences by a reward model, read at each sequence's last token. Runs anywhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.model.masking import length_mask
from common.model.packing import ROW_MULTIPLE
from common.model.probe import LENGTHS, UnsuitedModelError
from common.model.rotary import depends_on_length


def head_scores(model: PreTrainedModel, states: Tensor) -> Tensor:
    """The head's scores of states [N, H], float32 [N]. Autocast is off: bfloat16 has only eight bits for a score."""
    with torch.autocast(states.device.type, enabled=False):
        return model.score(states.float()).squeeze(-1)


def sequence_scores(model: PreTrainedModel, input_ids: Tensor, lengths: Tensor) -> Tensor:
    """Score of each row of right-padded input_ids [B, T], read at its last token, float32 [B].

    On CPU the bits of a score do not depend on the other rows if T is a multiple of ROW_MULTIPLE. The rows of the head
    are padded to such a multiple here.
    """
    mask, positions = length_mask(lengths, input_ids.shape[1]).long(), {}
    if depends_on_length(model.config):  # padding repeats the row's last position, so that it adds no length
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        positions = {"position_ids": places.minimum(lengths[:, None] - 1)}
    hidden = model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False, **positions).last_hidden_state
    states = hidden[torch.arange(len(lengths), device=hidden.device), lengths - 1]
    fill = -len(lengths) % ROW_MULTIPLE
    return head_scores(model, nn.functional.pad(states, (0, 0, 0, fill)))[: len(lengths)]


@torch.no_grad()
def check_rows_independent(model: PreTrainedModel, install: Callable[[PreTrainedModel], object] | None = None) -> None:
    """Calls `install`. Raises UnsuitedModelError if scores then depend on padding or on the other rows of a batch, or
    if they differ from the scores that the unchanged model gives to each sequence alone."""
    rows, lengths = len(model.get_input_embeddings().weight), torch.tensor(LENGTHS, device=model.device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(3, rows - 1), rows, (len(lengths), 2 * ROW_MULTIPLE), generator=generator).to(model.device)
    head = model.score.weight.clone()
    if not head.any():  # a new head is zero; a random one makes the states count
        model.score.weight.copy_(torch.randn(head.shape, generator=generator) * head.shape[1] ** -0.5)
    try:
        states = [
            model.base_model(row[None, :n], use_cache=False).last_hidden_state[:, -1]
            for row, n in zip(ids, lengths.tolist(), strict=True)
        ]
        alone = torch.cat([head_scores(model, state) for state in states])
        if install is not None:
            install(model)
        together = sequence_scores(model, ids.masked_fill(~length_mask(lengths, ids.shape[1]), 0), lengths)
    finally:
        model.score.weight.copy_(head)
    off = float((together - alone).norm() / alone.norm().clamp_min(1e-9))
    if not off < (1e-3 if model.dtype == torch.float32 else 0.1):  # also refuses NaN
        raise UnsuitedModelError(
            f"a sequence's score depends on the padding or the other sequences of its batch: it is off by {off:.2g} of "
            "its size"
        )
