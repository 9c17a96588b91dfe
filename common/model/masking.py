"""Masks, and sums, means, variances and whitening over their True places. A mask is True where something counts.

Runs anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """Lengths [B] as a mask [B, width]: row b is True on its first `lengths[b]` places."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def last_places(mask: Tensor) -> Tensor:
    """True on the last token of each row, bool [B, R]. The mask [B, R] has no holes. A row without tokens has none."""
    return mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)


def sequence_lengths(mask: Tensor, ends: Tensor) -> Tensor:
    """For each token, the number of tokens of its sequence, int64 [B, R]; 0 outside the mask. mask [B, R]: without
    holes. ends [B, R]: True on the last token of each sequence."""
    number = ends.long().cumsum(1) - ends.long()  # of the sequence of each token
    lengths = number.new_zeros(len(mask), mask.shape[1] + 1)  # places after the last end have a number of their own
    return torch.where(mask, lengths.scatter_add(1, number, mask.long()).gather(1, number), 0)


def check_no_holes(mask: Tensor) -> None:
    """Raises ValueError unless every row of the mask [B, R] is True from its first place to its last True one.

    A sum that runs backwards from a response's last token, as in GAE, would end at a gap: tokens before the gap would
    lose the rewards after it.
    """
    wrong = mask != length_mask(mask.sum(1), mask.shape[1])
    if wrong.any():
        row, place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"a response mask must be True from place 0 to the response's last token, without gaps, but row {row} is "
            f"{bool(mask[row, place])} at place {place}; put the tokens of a response side by side from place 0 on"
        )


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x where the mask is True. Other values, NaN included, are ignored."""
    return torch.where(mask, x, 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where the mask is True; 0 if the mask is False everywhere."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Population variance of x where the mask is True."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def var_above_rounding(x: Tensor, mask: Tensor) -> float:
    """`masked_var`, but 0 where it is only the rounding of float32 sums, such as GAE's over 100,000 tokens: a deviation
    below 1e-5 of the root mean square."""
    x = x.double()
    variance = float(masked_var(x, mask))
    return variance if variance > 1e-10 * float(masked_mean(x**2, mask)) else 0.0


def whiten(x: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """x shifted and scaled to mean 0 and variance 1 over the True places; 0 elsewhere.

    Computed in float64. In float32 the mean of equal numbers, such as 1000.1, differs from them by its rounding, and
    whitening would scale this difference up to 1.
    """
    wide = x.double()
    centred = wide - masked_mean(wide, mask)
    return torch.where(mask, centred * torch.rsqrt(masked_var(wide, mask) + eps), 0.0).to(x.dtype)


def round_up(count: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple
