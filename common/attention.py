"""Causal attention within sequences that lie one after another, without padding between them.

Importing this registers it with transformers as "packed"; a model loaded with that implementation takes `lengths`, the
number of tokens of each sequence, beside its inputs, and gives every sequence what it would have had alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
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
    """Sequences of about one length together; the backward pass computes the probabilities again, so that nothing
    quadratic is kept."""

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float, window: int
    ) -> Tensor:
        """query [heads, N, D], key and value [kv_heads, N, D]; returns [N, heads, D]."""
        ctx.save_for_backward(query, key, value)
        ctx.scaling, ctx.window = scaling, window
        ctx.layout = layout = _layout(tuple(lengths), len(query), len(key))
        q_rows, k_rows, v_rows = _rows(query), _rows(key), _rows(value)
        attended = []
        for group in layout.groups:
            q, k, v = group.queries(q_rows), group.keys(k_rows), group.keys(v_rows)
            attended.append(_probabilities(q, k, scaling, window) @ v)
        return _back(attended, layout.q_back).view(query.shape[1], query.shape[0], query.shape[2])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        q_rows, k_rows, v_rows, g_rows = _rows(query), _rows(key), _rows(value), gradient.flatten(0, 1)
        d_queries, d_keys, d_values = [], [], []
        for group in ctx.layout.groups:
            q, k, v, g = group.queries(q_rows), group.keys(k_rows), group.keys(v_rows), group.queries(g_rows)
            g.mul_(group.is_token.to(g.dtype))
            p = _probabilities(q, k, ctx.scaling, ctx.window)
            d_scores = torch.ops.aten._softmax_backward_data(g @ v.transpose(1, 2), p, -1, p.dtype).mul_(ctx.scaling)
            d_queries.append(d_scores @ k)
            d_keys.append(d_scores.transpose(1, 2) @ q)
            d_values.append(p.transpose(1, 2) @ g)
        d_query, d_key, d_value = (
            _back(parts, back).view(like.shape[1], like.shape[0], like.shape[2]).transpose(0, 1)
            for parts, back, like in (
                (d_queries, ctx.layout.q_back, query),
                (d_keys, ctx.layout.k_back, key),
                (d_values, ctx.layout.k_back, value),
            )
        )
        return d_query, d_key, d_value, None, None, None


# Sequences are padded to a multiple of this before they are multiplied. It depends on nothing but a sequence's own
# length, so that its result does not depend on its company.
_WIDTH = 32


@dataclass(frozen=True)
class _Group:
    """n sequences of one padded length T. Heads that share keys stand below one another, so that one product serves
    them: queries are [kv_heads * n, group * T, D], keys and values [kv_heads * n, T, D]."""

    length: int  # T
    q_index: Tensor  # where each row of the queries stands among rows [N * heads, D]; padding repeats the last token
    k_index: Tensor
    is_token: Tensor  # bool [kv_heads * n, group * T, 1]: False in padding

    def queries(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self.q_index).view(*self.is_token.shape[:2], -1)

    def keys(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self.k_index).view(len(self.is_token), self.length, -1)


@dataclass(frozen=True)
class _Layout:
    groups: list[_Group]
    q_back: Tensor  # [N * heads]: where each token's head stands among the rows of all groups
    k_back: Tensor  # [N * kv_heads]


@lru_cache(maxsize=4)  # every layer asks for the same one
def _layout(lengths: tuple[int, ...], heads: int, kv_heads: int) -> _Layout:
    widths = [round_up(length, _WIDTH) for length in lengths]
    ends = torch.tensor(lengths).cumsum(0)
    groups, real = [], []
    for width in sorted(set(widths)):
        chosen = torch.tensor([w == width for w in widths])
        own, last = torch.tensor(lengths)[chosen, None], ends[chosen, None] - 1
        place = torch.arange(width)
        tokens = (last - own + 1 + place).minimum(last)[:, None]  # [n, 1, T]
        is_token = (place < own)[:, None, None].expand(-1, kv_heads, heads // kv_heads, -1)
        q_index = tokens[:, None] * heads + torch.arange(heads).view(kv_heads, -1, 1)  # [n, kv_heads, group, T]
        k_index = tokens * kv_heads + torch.arange(kv_heads)[:, None]  # [n, kv_heads, T]
        shape = len(k_index) * kv_heads, heads // kv_heads * width, 1
        groups.append(_Group(width, q_index.flatten(), k_index.flatten(), is_token.reshape(shape)))
        real.append((is_token.flatten(), is_token[:, :, 0].flatten()))
    q_real, k_real = (torch.cat(parts) for parts in zip(*real, strict=True))
    q_back = _inverse(torch.cat([group.q_index for group in groups]), q_real)
    return _Layout(groups, q_back, _inverse(torch.cat([group.k_index for group in groups]), k_real))


def _inverse(index: Tensor, real: Tensor) -> Tensor:
    """Of every row where it stands in `index`, its repetitions, which are not `real`, aside."""
    places = real.nonzero().squeeze(1)
    return torch.empty_like(places).index_copy(0, index[places], places)


def _rows(x: Tensor) -> Tensor:
    """[heads, N, D] to [N * heads, D]."""
    return x.transpose(0, 1).reshape(-1, x.shape[-1])


def _back(parts: list[Tensor], index: Tensor) -> Tensor:
    """The groups' rows [.., D] in the order of the tokens and their heads."""
    return torch.cat([part.flatten(0, 1) for part in parts]).index_select(0, index)


def _probabilities(q: Tensor, k: Tensor, scaling: float, window: int) -> Tensor:
    """[kv_heads * n, group * T, T]; the softmax is float32 inside."""
    length = k.shape[1]
    scores = (q @ k.transpose(1, 2)).float().mul_(scaling).view(len(k), -1, length, length)
    # Adding -inf takes an eighth of what filling by a mask takes.
    return scores.add_(_barrier(length, window)).softmax(-1).to(q.dtype).view(len(k), -1, length)


def _visible(like: Tensor, window: int) -> Tensor:
    """bool [T, T], T = like.shape[-2]: a token sees itself and the `window` - 1 before it."""
    return _barrier(like.shape[-2], window).isfinite().to(like.device)


def _barrier(length: int, window: int) -> Tensor:
    """[length, length]: -inf where a row may not look, else 0. Cut from a larger one, which serves many calls."""
    size = round_up(length, 256)
    return _whole_barrier(size, window if window < length else size)[:length, :length]


@lru_cache(maxsize=4)
def _whole_barrier(length: int, window: int) -> Tensor:
    visible = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)
    return torch.zeros(length, length).masked_fill_(~visible, float("-inf"))
