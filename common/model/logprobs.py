"""Turns hidden states into log-probabilities and entropy of the chosen tokens, without ever holding all logits.

Runs anywhere. Measured on the update of common/model/kernels.py: autograd over checkpointed chunks would take 20 % more
peak memory (3,555 MB instead of 2,960) and up to 12 % more CPU time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

# A tile of logits: this many tokens, and this many entries of the vocabulary. On a CPU a tile stays in cache between
# its matrix product and the element-wise work on it. A GPU is faster with fewer, larger tiles.
CPU_TILE, GPU_TILE = (512, 2048), (2048, 16384)


@dataclass(frozen=True)
class Finish:
    """A model's last step on its logits z, after the output embedding: cap * tanh(scale * z / cap), or scale * z."""

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: PretrainedConfig) -> Finish:
        """The last step that the config describes: Gemma 2 caps, Cohere multiplies, Granite divides. A model may still
        do something else, so common/model/probe.py compares outputs."""
        text = config.get_text_config()
        factor, divisor = _number(text, "logit_scale"), _number(text, "logits_scaling")
        return cls(factor or 1 / (divisor or 1.0), _number(text, "final_logit_softcapping"))


def _number(config: PretrainedConfig, name: str) -> float | None:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) and 0 < value < math.inf else None


AS_IT_IS = Finish()


def chosen_logprobs(
    hidden: Tensor,
    token_ids: Tensor,
    head: nn.Linear,
    *,
    temperature: float,
    finish: Finish = AS_IT_IS,
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each chosen token, and the entropy of the distribution it was chosen from.

    hidden [N, H] are the states that predict token_ids [N]; head and `finish` map them to logits [N, V]. Returns two
    float32 [N], in nats. Only one tile of logits exists at once, and the backward pass computes them again. So memory
    grows with N + V, not with N * V.
    """
    tile = tile or (CPU_TILE if hidden.device.type == "cpu" else GPU_TILE)
    return _ChosenLogprobs.apply(hidden, head.weight, head.bias, token_ids, temperature, finish, tile)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The type that autocast computes in on this kind of device; None if it is off."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


class _ChosenLogprobs(torch.autograd.Function):
    """With logits z, already divided by the temperature T, m = log sum exp z, p = exp(z - m) and mean z' = sum p z:

    log p_a = z_a - m, H = -sum p log p = m - z'
    T d(log p_a)/dz_j = 1[j = a] - p_j      T dH/dz_j = -p_j (z_j - z')

    m and z' are accumulated tile by tile: the values for two parts of the vocabulary combine to those for both. With a
    cap c, z = c tanh(u) / T, where u = scale * head / c; its slope is scale (1 - tanh(u)^2) / T.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor,
        temperature: float,
        finish: Finish,
        tile: Tile,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = autocast_dtype(device) or weight.dtype
        states = hidden.detach().to(dtype)
        chosen, mean = (hidden.new_zeros(len(token_ids), dtype=torch.float32) for _ in range(2))
        total = torch.full_like(chosen, float("-inf"))
        with torch.autocast(device, enabled=False):
            for part, matrix, offset in _parts(weight, bias, dtype, tile[1]):
                for rows in _slices(len(states), tile[0]):
                    z = _logits(states[rows], matrix, offset, temperature, finish)
                    inside, column = _columns(token_ids[rows], part)
                    chosen[rows].add_(z.gather(-1, column).squeeze(-1).where(inside, 0.0))
                    p = z.softmax(-1)
                    part_total, part_mean = z.amax(-1) - p.amax(-1).log(), torch.linalg.vecdot(p, z)
                    both = torch.logaddexp(total[rows], part_total)
                    mean[rows].lerp_(part_mean, (part_total - both).exp_())
                    total[rows] = both
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(states, weight, bias, token_ids, total, mean)
        ctx.temperature, ctx.finish, ctx.tile, ctx.hidden_dtype = temperature, finish, tile, hidden.dtype
        return chosen - total, total - mean

    @staticmethod
    def backward(ctx, g_logprobs: Tensor | None, g_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        states, weight, bias, token_ids, total, mean = ctx.saved_tensors
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        g_logprobs = torch.zeros_like(total) if g_logprobs is None else g_logprobs
        d_hidden = torch.zeros_like(states, dtype=torch.float32)
        # Added in place to weight.grad: a second buffer of the size of the largest matrix would take too much memory.
        d_weight = (torch.zeros_like(weight) if weight.grad is None else weight.grad) if of_weight else None
        d_bias = torch.zeros_like(bias) if of_bias else None
        for part, matrix, offset in _parts(weight.detach(), bias, states.dtype, ctx.tile[1]):
            for rows in _slices(len(states), ctx.tile[0]):
                z = _logits(states[rows], matrix, offset, ctx.temperature, ctx.finish)
                slope = None if ctx.finish.cap is None else 1 - (z * (ctx.temperature / ctx.finish.cap)).square_()
                inside, column = _columns(token_ids[rows], part)
                g = g_logprobs[rows, None]
                p = (z - total[rows, None]).exp_()
                if g_entropy is None:
                    gradient = p.mul_(-g)
                else:
                    gradient = p.mul_(z.sub_(mean[rows, None]).mul_(g_entropy[rows, None]).add_(g)).neg_()
                gradient.scatter_add_(-1, column, g.where(inside[:, None], 0.0))
                if slope is not None:
                    gradient.mul_(slope)
                gradient = gradient.div_(ctx.temperature / ctx.finish.scale).to(states.dtype)
                if of_hidden:
                    d_hidden[rows].add_(gradient @ matrix)
                if d_weight is not None:
                    d_weight[part].add_(gradient.t() @ states[rows])
                if d_bias is not None:
                    d_bias[part].add_(gradient.sum(0))
        returned = None if d_weight is weight.grad else d_weight
        return d_hidden.to(ctx.hidden_dtype) if of_hidden else None, returned, d_bias, None, None, None, None


Tile = tuple[int, int]


def _parts(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, width: int
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """The parts of the vocabulary: the slice of token ids, and its rows of weight and bias in `dtype`."""
    for part in _slices(len(weight), width):
        yield part, weight[part].detach().to(dtype), None if bias is None else bias[part].detach().to(dtype)


def _slices(count: int, width: int) -> list[slice]:
    return [slice(start, min(start + width, count)) for start in range(0, count, width)]


def _logits(states: Tensor, matrix: Tensor, offset: Tensor | None, temperature: float, finish: Finish) -> Tensor:
    """The logits of one tile, divided by the temperature, float32."""
    logits = nn.functional.linear(states, matrix, offset).float()
    if finish.cap is not None:
        return logits.mul_(finish.scale / finish.cap).tanh_().mul_(finish.cap / temperature)
    return logits if temperature == finish.scale else logits.div_(temperature / finish.scale)


def _columns(token_ids: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """`inside` [n]: is the token in this part of the vocabulary? `column` [n, 1]: its column there, meaningless for
    tokens that are not inside."""
    inside = (token_ids >= part.start) & (token_ids < part.stop)
    return inside, (token_ids - part.start).clamp(0, part.stop - part.start - 1)[:, None]
