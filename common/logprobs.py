"""Hidden states to log-probabilities and entropy of the chosen tokens, a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def chosen_logprobs(
    hidden: Tensor, token_ids: Tensor, head: Callable[[Tensor], Tensor], *, temperature: float, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """Log-probability of each chosen token, and the entropy of the distribution it was chosen from.

    hidden [N, H] are the states that predict token_ids [N]; head maps [n, H] to logits [n, V]. Returns two float32
    [N], in nats. Logits live for one chunk only: with gradients on, the backward pass recomputes them, so memory grows
    with chunk * V, not with N * V.
    """
    if len(token_ids) == 0:
        empty = hidden.new_zeros(0, dtype=torch.float32)
        return empty, empty

    def one_chunk(states: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = (head(states).float() / temperature).log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return log_probs.gather(-1, chosen[:, None]).squeeze(-1), entropy

    recompute = torch.is_grad_enabled() and len(token_ids) > chunk
    parts = [
        checkpoint(one_chunk, states, chosen, use_reentrant=False) if recompute else one_chunk(states, chosen)
        for states, chosen in zip(hidden.split(chunk), token_ids.split(chunk), strict=True)
    ]
    logprobs, entropies = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)
