"""Recomputed attention as one operation of autograd, and of torch.compile. Runs anywhere.

torch.compile cannot trace loops over lengths that change, so in a compiled layer this is one opaque operation. Both
forms compute the same (common/model/recomputed_attention.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common.model.lengths import Lengths
from common.model.recomputed_attention import Scores, attended, gradients


def recomputed_attention(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, lengths: Lengths, scores: Scores
) -> Tensor:
    """query [heads, N, D], key [kv_heads, N, D], value [kv_heads, N, E], sinks [heads]; returns [N, heads, E]."""
    if torch.compiler.is_compiling():
        how = scores.scaling, scores.window, scores.cap
        return torch.ops.ratchet.attention(query, key, value, sinks, lengths.ends_on_host, *how)
    return _Recomputed.apply(query, key, value, sinks, lengths.each, scores)


class _Recomputed(torch.autograd.Function):
    """Keeps only its inputs for the backward pass."""

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, lengths: tuple[int, ...], scores: Scores
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, sinks)
        ctx.how = lengths, scores
        return attended(query, key, value, sinks, lengths, scores)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *heads, d_sinks = gradients(gradient, *ctx.saved_tensors, *ctx.how)
        return *(rows.transpose(0, 1) for rows in heads), d_sinks, None, None


# torch reads the schema of an operation from its signature, so both operations list all arguments.
@torch.library.custom_op("ratchet::attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    ends: Tensor,
    scaling: float,
    window: int | None,
    cap: float | None,
) -> Tensor:
    return attended(query, key, value, sinks, tuple(ends.diff().tolist()), Scores(scaling, window, cap))


@torch.library.custom_op("ratchet::attention_gradients", mutates_args=())
def _attention_gradients(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    ends: Tensor,
    scaling: float,
    window: int | None,
    cap: float | None,
) -> list[Tensor]:
    how = tuple(ends.diff().tolist()), Scores(scaling, window, cap)
    return [found for found in gradients(gradient, query, key, value, sinks, *how) if found is not None]


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape[1], query.shape[0], value.shape[2])


@_attention_gradients.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *_: Any) -> list[Tensor]:
    heads = [x.new_empty(x.shape[1], x.shape[0], x.shape[2]) for x in (query, key, value)]
    return heads if sinks is None else [*heads, torch.empty_like(sinks)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, sinks, ends, *ctx.how = inputs
    ctx.save_for_backward(query, key, value, sinks, ends)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.ratchet.attention_gradients(gradient, *ctx.saved_tensors, *ctx.how)
    d_sinks = found[3] if len(found) > 3 else None
    return *(rows.transpose(0, 1) for rows in found[:3]), d_sinks, None, None, None, None


_attention.register_autograd(_backward, setup_context=_keep)
