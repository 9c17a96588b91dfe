"""Causal attention within sequences that lie one after another, without padding between them.

Importing this registers it with transformers as "packed"; a model loaded with that implementation takes `lengths`, the
number of tokens of each sequence, beside its inputs, and gives every sequence what it would have had alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from common.masking import round_up

PACKED = "packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    lengths: list[int] | None = None,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """query [1, heads, N, D], key and value [1, kv_heads, N, D], N = sum(lengths); returns [1, N, heads, D]. Without
    `lengths` all is one sequence."""
    lengths = lengths or [query.shape[2]]
    longest = max(lengths)
    window = sliding_window if sliding_window and sliding_window < longest else longest
    if query.device.type == "cpu":
        return _CPUAttention.apply(query[0], key[0], value[0], lengths, scaling, window)[None], None
    if query.dtype in (torch.bfloat16, torch.float16):
        ends = torch.tensor([0, *lengths], device=query.device).cumsum(0).to(torch.int32)
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        attended = varlen_attn(
            q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(window - 1, 0), enable_gqa=True
        )
        return cast(Tensor, attended)[None], None
    each = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)  # flash attention has no float32
    parts = [
        scaled_dot_product_attention(q, k, v, attn_mask=_visible(q, window), scale=scaling, enable_gqa=True)
        for q, k, v in each
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


AttentionInterface.register(PACKED, packed_attention)


class _CPUAttention(torch.autograd.Function):
    """Sequence by sequence, neighbours of one length together; the backward pass computes the probabilities again, so
    that nothing quadratic is kept."""

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float, window: int
    ) -> Tensor:
        """query [heads, N, D], key and value [kv_heads, N, D]; returns [N, heads, D]."""
        ctx.save_for_backward(query, key, value)
        ctx.lengths, ctx.scaling, ctx.window = lengths, scaling, window
        attended = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
        for place, length in _runs(lengths):
            q, k, v = (_by_sequence(x[:, place], length, len(key)) for x in (query, key, value))
            attended[place] = _by_token(_probabilities(q, k, scaling, window) @ v, length, len(key))
        return attended

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        d_query, d_key, d_value = (torch.empty_like(x) for x in (query, key, value))
        for place, length in _runs(ctx.lengths):
            q, k, v = (_by_sequence(x[:, place], length, len(key)) for x in (query, key, value))
            g = _by_sequence(gradient[place].transpose(0, 1), length, len(key))
            p = _probabilities(q, k, ctx.scaling, ctx.window)
            # Through the softmax: p (dp - sum p dp).
            weighted = (g @ v.transpose(1, 2)).float().mul_(p)
            scores = weighted.sub_(p * weighted.sum(-1, keepdim=True)).mul_(ctx.scaling).to(q.dtype)
            for whole, part in (
                (d_query, scores @ k),
                (d_key, scores.transpose(1, 2) @ q),
                (d_value, p.transpose(1, 2) @ g),
            ):
                whole[:, place] = _by_token(part, length, len(key)).transpose(0, 1)
        return d_query, d_key, d_value, None, None, None


def _runs(lengths: list[int]) -> Iterator[tuple[slice, int]]:
    """Where neighbouring sequences of one length lie, and that length."""
    start = 0
    for length, run in groupby(lengths):
        stop = start + length * len(list(run))
        yield slice(start, stop), length
        start = stop


def _by_sequence(x: Tensor, length: int, kv_heads: int) -> Tensor:
    """[heads, n * T, D] to [kv_heads * n, group * T, D]: heads that share keys stand below one another."""
    heads, count, width = x.shape
    return (
        x.reshape(kv_heads, heads // kv_heads, count // length, length, width)
        .transpose(1, 2)
        .reshape(kv_heads * count // length, heads // kv_heads * length, width)
    )


def _by_token(x: Tensor, length: int, kv_heads: int) -> Tensor:
    """The way back, but [n * T, heads, D]."""
    count, group, width = x.shape[0] // kv_heads, x.shape[1] // length, x.shape[2]
    x = x.view(kv_heads, count, group, length, width)
    return x.permute(1, 3, 0, 2, 4).reshape(count * length, kv_heads * group, width)


def _probabilities(q: Tensor, k: Tensor, scaling: float, window: int) -> Tensor:
    """[kv_heads * n, group * T, T]; the softmax is float32 inside."""
    length = k.shape[1]
    scores = (q @ k.transpose(1, 2)).float().mul_(scaling).view(len(k), -1, length, length)
    scores.masked_fill_(_hidden(length, window), float("-inf"))
    return scores.softmax(-1).to(q.dtype).view(len(k), -1, length)


def _visible(like: Tensor, window: int) -> Tensor:
    """[T, T], T = like.shape[-2]: a token sees itself and the `window` - 1 before it."""
    return ~_hidden(like.shape[-2], window).to(like.device)


def _hidden(length: int, window: int) -> Tensor:
    """bool [length, length]: True where a row may not look. Cut from a larger one, which serves many calls."""
    return _all_hidden(round_up(length, 256), window)[:length, :length]


@lru_cache(maxsize=4)
def _all_hidden(length: int, window: int) -> Tensor:
    visible = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)
    return ~visible
