"""Hidden states to log-probabilities and entropy of the chosen tokens, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

# A matrix product wants many rows; the element-wise work on float32 logits few, which stay in the cache (measured on
# CPU: 32 rows of 49,152 logits). A GPU takes the whole chunk at once.
CHUNK_ROWS = 256
_CPU_BLOCK_ROWS = 32
_PART_ROWS = 8192


def chosen_logprobs(
    hidden: Tensor, token_ids: Tensor, head: nn.Linear, *, temperature: float, chunk: int = CHUNK_ROWS
) -> tuple[Tensor, Tensor]:
    """Log-probability of each chosen token, and the entropy of the distribution it was chosen from.

    hidden [N, H] are the states that predict token_ids [N]; head maps them to logits [N, V]. Returns two float32 [N],
    in nats. Logits live for one chunk only, and the backward pass computes them again: memory grows with chunk * V, not
    with N * V.
    """
    return _ChosenLogprobs.apply(hidden, head.weight, head.bias, token_ids, temperature, chunk)


class _ChosenLogprobs(torch.autograd.Function):
    """With logits z, p = softmax(z / T), l = log p and H = -sum p l:

    dl_a / dz_j = (1[j = a] - p_j) / T      dH / dz_j = -p_j (l_j + H) / T
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        states, matrix = hidden.detach().to(dtype), weight.detach().to(dtype)
        logprobs, entropy = (hidden.new_empty(len(token_ids), dtype=torch.float32) for _ in range(2))
        with torch.autocast(device, enabled=False):
            for rows, logits in _chunks(states, matrix, bias, chunk):
                for block, scaled in _blocks(rows, logits, temperature):
                    log_p = scaled.sub_(scaled.logsumexp(-1, keepdim=True))
                    logprobs[block] = log_p.gather(-1, token_ids[block, None]).squeeze(-1)
                    entropy[block] = -torch.linalg.vecdot(log_p.exp(), log_p)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(states, weight, bias, token_ids, entropy)
        ctx.temperature, ctx.chunk, ctx.dtypes = temperature, chunk, (hidden.dtype, dtype)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, g_logprobs: Tensor | None, g_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        states, weight, bias, token_ids, entropy = ctx.saved_tensors
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        hidden_dtype, dtype = ctx.dtypes
        matrix, d_hidden = weight.detach().to(dtype), torch.empty_like(states)
        # Into the gradient that is there already: of the largest matrix a second one would be felt.
        d_weight = (torch.zeros_like(weight) if weight.grad is None else weight.grad) if of_weight else None
        d_bias = torch.zeros_like(bias) if of_bias else None
        for rows, logits in _chunks(states, matrix, bias, ctx.chunk):
            for block, scaled in _blocks(rows, logits, ctx.temperature):
                log_p = scaled.sub_(scaled.logsumexp(-1, keepdim=True))
                g = torch.zeros_like(entropy[block]) if g_logprobs is None else g_logprobs[block]
                if g_entropy is None:
                    gradient = log_p.exp_().mul_(-g[:, None])
                else:
                    inner = (log_p + entropy[block, None]).mul_(g_entropy[block, None]).add_(g[:, None])
                    gradient = log_p.exp_().mul_(inner).neg_()
                gradient.scatter_add_(-1, token_ids[block, None], g[:, None])
                # In place of the logits, which nobody needs any more.
                logits[block.start - rows.start : block.stop - rows.start] = gradient.div_(ctx.temperature)
            if of_hidden:
                d_hidden[rows] = logits @ matrix
            if d_weight is not None:  # in parts, for each is a copy before it is added
                for part, of_part in zip(d_weight.split(_PART_ROWS), logits.split(_PART_ROWS, dim=1), strict=True):
                    part += of_part.t() @ states[rows]
            if d_bias is not None:
                d_bias += logits.sum(0)
        returned = None if d_weight is weight.grad else d_weight
        return d_hidden.to(hidden_dtype), returned, d_bias, None, None, None


def _chunks(states: Tensor, matrix: Tensor, bias: Tensor | None, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and their logits [n, V]."""
    for start in range(0, len(states), chunk):
        rows = slice(start, min(start + chunk, len(states)))
        yield rows, nn.functional.linear(states[rows], matrix, None if bias is None else bias.to(matrix.dtype))


def _blocks(rows: slice, logits: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a chunk, a few at a time, and their logits over the temperature, float32, for the caller to change."""
    step = _CPU_BLOCK_ROWS if logits.device.type == "cpu" else len(logits)
    for start in range(rows.start, rows.stop, step):
        block = slice(start, min(start + step, rows.stop))
        scaled = logits[start - rows.start : block.stop - rows.start].float()
        yield block, scaled if temperature == 1 else scaled.div_(temperature)
