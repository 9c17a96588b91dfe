"""Prompts and responses as right-padded tensors, and rows grouped under a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.logprobs import chosen_logprobs
from common.masking import length_mask

# Matrix products over whole vectors take the same kernels whatever else is in the batch. Measured with AVX-512, one
# thread, float32 and bfloat16: without it 1 to 20 of 48 rows change in their last bits with the company they are in.
LANES = 16


@dataclass(frozen=True)
class Sequences:
    """B prompts, each followed at once by its response; padding stands at the end of a row and is never looked at."""

    input_ids: Tensor  # int64 [B, T]
    prompt_lengths: Tensor  # int64 [B]
    lengths: Tensor  # int64 [B], prompt and response

    @classmethod
    def pad(cls, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], *, multiple_of: int = 1) -> Sequences:
        """Pads to the longest row, or to the next multiple. A prompt must not be empty: the first response token needs
        a state to come from."""
        if not all(len(prompt) for prompt in prompts):
            raise ValueError("a prompt without tokens cannot be answered; give it at least one")
        lengths = torch.tensor([len(pair[0]) + len(pair[1]) for pair in zip(prompts, responses, strict=True)])
        input_ids = torch.zeros(len(prompts), round_up(int(lengths.max()), multiple_of), dtype=torch.int64)
        for row, pair, length in zip(input_ids, zip(prompts, responses, strict=True), lengths, strict=True):
            row[:length] = torch.from_numpy(np.concatenate(pair))
        return cls(input_ids, torch.tensor([len(prompt) for prompt in prompts]), lengths)

    def rows(self, index: Tensor) -> Sequences:
        """The chosen rows, cut to the longest of them."""
        lengths = self.lengths[index]
        width = int(lengths.max()) if len(lengths) else 0
        return Sequences(self.input_ids[index, :width], self.prompt_lengths[index], lengths)

    def to(self, device: torch.device) -> Sequences:
        return Sequences(self.input_ids.to(device), self.prompt_lengths.to(device), self.lengths.to(device))

    @property
    def response_lengths(self) -> Tensor:
        return self.lengths - self.prompt_lengths

    @property
    def response_mask(self) -> Tensor:
        """[B, R], R the longest response."""
        return length_mask(self.response_lengths, int(self.response_lengths.max()))

    def response_states(self, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        """The states that predict each response token, [N, H], and those tokens, [N]: row after row, no padding.

        `model` is any transformer body; prompt positions never reach a head.
        """
        hidden = model(
            input_ids=self.input_ids,
            attention_mask=length_mask(self.lengths, self.input_ids.shape[1]).long(),
            use_cache=False,
        ).last_hidden_state
        position = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        is_response = (position >= self.prompt_lengths[:, None]) & (position < self.lengths[:, None])
        # The state at position t predicts the token at t + 1.
        return hidden[:, :-1][is_response[:, 1:]], self.input_ids[is_response]

    def scatter(self, flat: Tensor) -> Tensor:
        """[N] values, row after row, to [B, R] with zeros in the padding."""
        mask = self.response_mask
        return flat.new_zeros(mask.shape).masked_scatter(mask, flat)


def response_logprobs(model: PreTrainedModel, sequences: Sequences, *, temperature: float) -> Tensor:
    """Log-probability of every response token under a causal LM, float32 [B, R].

    On CPU a row gets the same bits in any company if rows are padded to a multiple of LANES, as the head's are here.
    """
    states, token_ids = sequences.response_states(model.base_model)
    count = len(token_ids)
    fill = round_up(count, LANES) - count
    states = torch.nn.functional.pad(states, (0, 0, 0, fill))
    token_ids = torch.nn.functional.pad(token_ids, (0, fill))
    logprobs, _ = chosen_logprobs(states, token_ids, model.get_output_embeddings(), temperature=temperature)
    return sequences.scatter(logprobs[:count])


def token_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of all rows, grouped so that no group holds more than `max_tokens` once padded to its longest row.

    Rows of like length share a group, so little is padded. A single row longer than the budget is a group of its own.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # The first of a group is its longest.
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def round_up(count: int, multiple: int) -> int:
    """The next multiple, or `count` if it is one."""
    return -(-count // multiple) * multiple
