"""Causal attention within packed sequences, which follow one another in one long row, without padding.

Runs anywhere. Importing this module registers it with transformers as "packed". A model loaded with that implementation
also takes `lengths`, the number of tokens of each sequence. It computes the same for a sequence as if it were alone.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from common.model.attention_operation import recomputed_attention
from common.model.lengths import Lengths
from common.model.recomputed_attention import Scores, causal_bias

PACKED = "packed"
# Arguments whose names begin with one of these do not change the result, and are ignored.
_HARMLESS = ("position_ids", "cache_position", "use_cache", "output_")


class AttentionError(ValueError):
    """A model passes arguments that packed attention does not support, or no `lengths`. The message describes it."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    lengths: Lengths | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    dropout: float = 0.0,
    **others: object,
) -> tuple[Tensor, None]:
    """query and key [1, heads, N, D], value [1, heads, N, E], N = sum(lengths); key and value may have fewer heads.
    Returns [1, N, heads, E].

    softcap: scores become c tanh(score / c). s_aux [heads]: sinks, a score per head that takes part in the softmax and
    has no value. Raises AttentionError for anything else a model asks for, and without `lengths`.
    """
    _refuse(lengths, dropout, others)
    lengths = cast(Lengths, lengths)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    longest = lengths.longest
    window = sliding_window if sliding_window and sliding_window < longest else None
    on_cpu, plain = query.device.type == "cpu", softcap is None and s_aux is None
    if on_cpu or not plain or value.shape[-1] > query.shape[-1]:
        how = Scores(scaling, window, softcap)
        return recomputed_attention(query[0], key[0], value[0], s_aux, lengths, how)[None], None
    if _flash_takes(query):
        ends, left = lengths.ends, -1 if window is None else window - 1
        narrow, width = value.shape[-1], query.shape[-1]  # flash attention needs values as wide as keys
        value = value if narrow == width else pad(value, (0, width - narrow))
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        attended = varlen_attn(
            q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(left, 0), enable_gqa=True
        )
        return cast(Tensor, attended)[None, ..., :narrow], None
    return _each_alone(query, key, value, lengths, window, scaling), None


AttentionInterface.register(PACKED, packed_attention)


def _refuse(lengths: Lengths | None, dropout: float, others: dict[str, object]) -> None:
    """Raises AttentionError for unknown arguments. Ignoring them would make the result silently wrong."""
    if lengths is None:
        raise AttentionError("its layers do not pass `lengths`, the sizes of packed sequences, on to their attention")
    if others.get("is_causal") is True:
        others = {**others, "is_causal": None}
    asked = [name for name, value in others.items() if value is not None and not name.startswith(_HARMLESS)]
    if dropout:
        asked.append("dropout")
    if asked:
        raise AttentionError(f"its attention uses {', '.join(asked)}, which packed attention does not have")


def _flash_takes(query: Tensor) -> bool:
    """True if the packed kernel has this type and head size."""
    return query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256


@torch.compiler.disable(reason="its type or head size has no packed kernel")
def _each_alone(
    query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, window: int | None, scaling: float
) -> Tensor:
    """Computes one sequence after another. torch.compile would make one graph for each list of lengths."""
    each = zip(*(x.split(lengths.each, dim=2) for x in (query, key, value)), strict=True)
    parts = [
        scaled_dot_product_attention(q, k, v, attn_mask=_causal_mask(q, window), scale=scaling, enable_gqa=True)
        for q, k, v in each
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


def _causal_mask(like: Tensor, window: int | None) -> Tensor:
    """bool [T, T], T = like.shape[-2]: a token attends to itself and the `window` - 1 tokens before it."""
    return causal_bias(like.shape[-2], window, like.device).isfinite()
