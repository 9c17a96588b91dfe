"""Packed sequences: prompts and responses one after another in one long row, without padding. Runs anywhere.

The model reads the tokens that an environment wrote inside a response, but they have no place in tensors [B, R]. So
code that computes something for each token of a response skips them automatically.

A response may have new prompts inside it. A new prompt starts a new context: the tokens from there on do not see
earlier ones. Each context has its own positions and attention, like a separate row. In tensors [B, R] all sampled
tokens of the row are still next to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.model.lengths import Lengths
from common.model.logprobs import Finish, autocast_dtype, chosen_logprobs
from common.model.masking import length_mask
from common.model.transfer import on_device

# Row counts of matrix products are padded to a multiple of this. Libraries choose a kernel by shape, so without padding
# the last bits of a row depend on the other rows of its batch. Measured with AVX-512, one thread, float32 and bfloat16:
# 1 to 20 of 48 rows changed.
ROW_MULTIPLE = 16


@dataclass(frozen=True)
class Sequences:
    """B sequences, each a prompt and its response, one after another: N tokens in all, C contexts.

    Lengths and `sampled` are always on the CPU, so that shapes and places are known without waiting for a GPU.
    """

    input_ids: Tensor  # int64 [N], on the model's device
    prompt_lengths: Tensor  # int64 [B]
    lengths: Tensor  # int64 [B], prompt and response
    sampled: Tensor  # bool [N], True on the tokens of responses that the policy sampled
    contexts: Tensor  # int64 [B], contexts of each sequence: 1, and one more for each new prompt inside the response
    context_lengths: Tensor  # int64 [C], tokens of each context; those of a sequence add up to its length

    @classmethod
    def pack(
        cls,
        prompts: Sequence[np.ndarray],
        responses: Sequence[np.ndarray],
        masks: Sequence[np.ndarray] | None = None,
        starts: Sequence[Sequence[int]] | None = None,
    ) -> Sequences:
        """Packs token ids. `masks` are True on the response tokens that the policy sampled; left out: on all of them.
        `starts` are the places in each response where a new prompt begins, in order; left out: nowhere. Raises
        ValueError for an empty prompt: the state of its last token must predict the first response token."""
        if not all(len(prompt) for prompt in prompts):
            raise ValueError("a prompt without tokens cannot be answered; give it at least one")
        if masks is None:
            masks = [np.ones(len(response), dtype=np.bool_) for response in responses]
        pairs = list(zip(prompts, responses, strict=True))
        tokens = np.concatenate([part for pair in pairs for part in pair] or [np.empty(0)])
        sampled = [(np.zeros(len(p), np.bool_), mask) for p, mask in zip(prompts, masks, strict=True)]
        flags = np.concatenate([part for pair in sampled for part in pair] or [np.empty(0, np.bool_)])
        if len(flags) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens have {len(flags)} places in prompts and masks; give each token one")
        if starts is None:
            starts = [()] * len(pairs)
        contexts = [_context_lengths(*row) for row in zip(prompts, responses, masks, starts, strict=True)]
        return cls(
            torch.from_numpy(tokens.astype(np.int64)),
            torch.tensor([len(prompt) for prompt, _ in pairs], dtype=torch.int64),
            torch.tensor([len(prompt) + len(response) for prompt, response in pairs], dtype=torch.int64),
            torch.from_numpy(flags),
            torch.tensor([len(lengths) for lengths in contexts], dtype=torch.int64),
            torch.tensor([length for lengths in contexts for length in lengths], dtype=torch.int64),
        )

    def rows(self, index: Tensor) -> Sequences:
        """The sequences at `index`, in that order."""

        def chosen(flat: Tensor, counts: Tensor) -> Tensor:
            parts = flat.split(counts.tolist())
            return torch.cat([parts[i] for i in index.tolist()] or [flat[:0]])

        return Sequences(
            chosen(self.input_ids, self.lengths),
            self.prompt_lengths[index],
            self.lengths[index],
            chosen(self.sampled, self.lengths),
            self.contexts[index],
            chosen(self.context_lengths, self.contexts),
        )

    def to(self, device: torch.device) -> Sequences:
        """The same sequences, with their tokens on another device."""
        return replace(self, input_ids=on_device(self.input_ids, device))

    @cached_property
    def response_lengths(self) -> Tensor:
        """Tokens that the policy sampled, int64 [B]."""
        return self._sampled_in(self.lengths)

    @cached_property
    def context_response_lengths(self) -> Tensor:
        """Sampled tokens of each context, int64 [C]."""
        return self._sampled_in(self.context_lengths)

    def _sampled_in(self, lengths: Tensor) -> Tensor:
        before = torch.cat([torch.zeros(1, dtype=torch.int64), self.sampled.cumsum(0)])
        ends = lengths.cumsum(0)
        return before[ends] - before[ends - lengths]

    @property
    def response_mask(self) -> Tensor:
        """bool [B, R], R the longest response; on the CPU."""
        return length_mask(self.response_lengths, int(self.response_lengths.max()))

    def response_states(self, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        """The states that predict each sampled token, [n, H], and those tokens, [n], sequence after sequence.

        `model` is any transformer body with packed attention. States before other tokens are left out, so no output
        embedding computes them.
        """
        positions, places = self._positions
        hidden = model(
            inputs_embeds=embed(model, self.input_ids[None]),
            position_ids=positions[None],
            use_cache=False,
            lengths=self._packed_lengths,
        ).last_hidden_state[0]
        # The state at position t predicts the token at t + 1.
        return hidden.index_select(0, places - 1), self.input_ids.index_select(0, places)

    def scatter(self, flat: Tensor) -> Tensor:
        """Puts [n] values of sampled tokens, sequence after sequence, into [B, R], with zeros in the padding."""
        shape, cells = self._cells
        return flat.new_zeros(shape.numel()).index_copy(0, cells.to(flat.device), flat).view(shape)

    @cached_property
    def _positions(self) -> tuple[Tensor, Tensor]:
        """The position of each token in its context, [N], and the places of the sampled tokens among all, [n]."""
        starts = self.context_lengths.cumsum(0) - self.context_lengths
        positions = torch.arange(len(self.input_ids)) - starts.repeat_interleave(self.context_lengths)
        places = self.sampled.nonzero().squeeze(1)
        device = self.input_ids.device
        return on_device(positions, device), on_device(places, device)

    @cached_property
    def _packed_lengths(self) -> Lengths:
        return Lengths(self.context_lengths.tolist(), self.input_ids.device)

    @cached_property
    def _cells(self) -> tuple[torch.Size, Tensor]:
        """The shape [B, R], and the places of the sampled tokens in the flattened tensor, [n]."""
        mask = self.response_mask
        return mask.shape, on_device(mask.flatten().nonzero().squeeze(1), self.input_ids.device)


def _context_lengths(prompt: np.ndarray, response: np.ndarray, mask: np.ndarray, starts: Sequence[int]) -> list[int]:
    """Tokens of each context of one row. Raises ValueError unless every new prompt begins with a token of its own."""
    if any(first >= second for first, second in pairwise([-1, *starts, len(response)] if starts else ())):
        raise ValueError(f"new prompts must begin one after another in a response of {len(response)}, not at {starts}")
    if sampled := [start for start in starts if mask[start]]:
        raise ValueError(f"a new prompt begins at place {sampled[0]} with a token that the policy sampled")
    return [second - first for first, second in pairwise([-len(prompt), *starts, len(response)])]


def embed(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Input embeddings, cast to autocast's dtype if it is on. Without the cast, the residual stream is float32."""
    embedded = model.get_input_embeddings()(input_ids)
    return embedded.to(autocast_dtype(embedded.device.type) or embedded.dtype)


def response_logprobs(model: PreTrainedModel, sequences: Sequences, *, temperature: float) -> Tensor:
    """Log-probability of every sampled token under a causal LM, float32 [B, R]."""
    states, token_ids = sequences.response_states(model.base_model)
    # Pad the rows of the output embedding's product too: each response begins at a multiple of ROW_MULTIPLE.
    missing = -sequences.response_lengths % ROW_MULTIPLE
    before = (missing.cumsum(0) - missing).repeat_interleave(sequences.response_lengths)
    places = on_device(torch.arange(len(states)) + before, states.device)
    count = len(states) + int(missing.sum())
    states = states.new_zeros(count, states.shape[1]).index_copy(0, places, states)
    token_ids = token_ids.new_zeros(count).index_copy(0, places, token_ids)
    head, finish = model.get_output_embeddings(), Finish.of(model.config)
    logprobs, _ = chosen_logprobs(states, token_ids, head, temperature=temperature, finish=finish)
    return sequences.scatter(logprobs[places])
