"""The distance of a policy from its base: KL by token position, perplexity of text. Runs in the driver; no torch.

kl is rollout_logprobs - ref_logprobs of each token that the policy sampled. Its mean estimates the KL from the base
(k1, unbiased), so single tokens may be below 0. nll is the negative log-probability of each token of a text. Both are
in nats.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from learner.evaluation.bootstrap import Bootstrap, Figure
from learner.evaluation.figures import figures, mean, ratio

SINGLE = 8  # positions that have a bin of their own
PARTS = 4  # bins from each power of two to the next


def position_bins(longest: int) -> np.ndarray:
    """The first position of each bin. The first tokens have a bin each, because a policy often moves most there. Later
    bins get wider: each is a quarter of the way to the next power of two. A response of 2,048 tokens has 40 bins."""
    starts = list(range(min(SINGLE, longest)))
    width, start = SINGLE // PARTS, SINGLE
    while start < longest:
        starts += [first for first in range(start, 2 * start, width) if first < longest]
        start, width = 2 * start, 2 * width
    return np.array(starts, dtype=np.int64)


def kl_by_position(prompts: np.ndarray, kl: Sequence[np.ndarray], bootstrap: Bootstrap) -> list[dict[str, Any]]:
    """Mean KL per token in each bin of positions: the first and last position, the number of its tokens in all
    responses, value and interval. Few responses are long, so late bins have few tokens. prompts [A]: the prompt of each
    answer, whose tokens have `kl`."""
    lengths = np.array([len(tokens) for tokens in kl], dtype=np.int64)
    if not lengths.sum():
        return []
    starts = position_bins(int(lengths.max()))
    places = np.concatenate([np.arange(length) for length in lengths])
    bins = np.searchsorted(starts, places, side="right") - 1
    # A row for each prompt, a column for each bin: the sum of its tokens, and their number.
    cells, shape = prompts.repeat(lengths) * len(starts) + bins, (bootstrap.prompts, len(starts))
    sums, tokens = (
        np.bincount(cells, weights, math.prod(shape)).reshape(shape)
        for weights in (np.concatenate(kl).astype(np.float64), None)
    )
    found = figures(np.concatenate([sums, tokens], axis=1), bootstrap, ratio, tokens)
    ends = [*(starts[1:] - 1), lengths.max() - 1]
    return [
        {"first": int(first), "last": int(last), "tokens": int(count), **figure}
        for first, last, count, figure in zip(starts, ends, tokens.sum(0), found, strict=True)
    ]


def perplexity(nll: np.ndarray, tokens: np.ndarray, bootstrap: Bootstrap) -> Figure:
    """exp(mean nll per token). nll [W]: the sum of each window; tokens [W]: their number. Resamples windows. None in
    place of numbers that are too large for a float."""
    nats = mean(np.arange(len(nll)), nll, bootstrap, counts=tokens)
    ends = nats["interval"] and [_exp(end) for end in nats["interval"]]
    return {"value": _exp(nats["value"]), "interval": None if ends is None or None in ends else ends}


def perplexity_ratio(nll: np.ndarray, base_nll: np.ndarray, tokens: np.ndarray, bootstrap: Bootstrap) -> Figure:
    """The perplexity divided by the base's on the same windows. Above 1 the policy has forgotten some of the text. Both
    find the same windows hard, so this interval is narrower than those of the two perplexities."""
    return perplexity(nll - base_nll, tokens, bootstrap)


def _exp(nats: float) -> float | None:
    return math.exp(nats) if nats < math.log(sys.float_info.max) else None
