"""Diversity of a policy's answers: distinct n-grams, different answers, entropy. Runs in the driver; no torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.turns import messages_of
from common.types import Rollout
from learner.evaluation.bootstrap import Bootstrap, Figure
from learner.evaluation.figures import jackknife, mean
from learner.evaluation.shares import share

NGRAMS = (1, 2, 3)
_BITS = 21  # of a token id in the code of an n-gram: three fit into 64 bits, for vocabularies of up to two million


def messages(rollout: Rollout) -> list[np.ndarray]:
    """The tokens of each message of the policy, int32. Without an environment there is one message."""
    places = messages_of(rollout.turns, len(rollout.response_ids))
    return [rollout.response_ids[start:end] for start, end, _ in places]


def distinct(
    prompts: np.ndarray, samples: np.ndarray, answers: Sequence[Sequence[np.ndarray]], n: int, *, count: int
) -> Figure:
    """Distinct token n-grams divided by all n-grams (Li et al. 2016, arXiv:1510.03055), for one answer to each prompt;
    the mean over the samples. 0 if there are none.

    prompts and samples [A]: the prompt of each answer, from 0 to `count` - 1, and its number among the answers to that
    prompt. answers: the messages of each answer; no n-gram spans two messages, because the environment wrote between
    them. Each sample is counted alone, because the share falls as the amount of text grows.
    """
    shares, without = [], []
    for sample in np.unique(samples):
        chosen = np.flatnonzero(samples == sample)
        codes = [np.concatenate([_ngrams(ids, n) for ids in answers[answer]]) for answer in chosen]
        owners = prompts[chosen].repeat([len(grams) for grams in codes])
        different, own = _different(np.concatenate(codes), owners, count)
        number = np.bincount(owners, minlength=count)
        shares.append(different / max(1, len(owners)))
        without.append((different - own) / np.maximum(1, len(owners) - number))
    if not shares:
        return {"value": 0.0, "interval": None}
    return jackknife(float(np.mean(shares)), np.mean(without, axis=0))


def different_answers(prompts: np.ndarray, responses: Sequence[np.ndarray]) -> Figure | None:
    """Different answers to a prompt (token ids), divided by all answers to it; the mean over prompts. Falls as the
    number of samples grows. None if no prompt has two answers."""
    answers: dict[int, list[bytes]] = {}
    for prompt, ids in zip(prompts.tolist(), responses, strict=True):
        answers.setdefault(prompt, []).append(ids.tobytes())
    shares = [len(set(found)) / len(found) for found in answers.values() if len(found) > 1]
    return share(np.array(shares)) if shares else None


def entropy(prompts: np.ndarray, logprobs: Sequence[np.ndarray], bootstrap: Bootstrap) -> Figure:
    """Entropy of the distribution that tokens were sampled from, nats per token: -mean of rollout_logprobs. It is an
    unbiased estimate, because the tokens were sampled from that distribution. Temperature and truncation count."""
    sums = np.array([-tokens.sum(dtype=np.float64) for tokens in logprobs])
    return mean(prompts, sums, bootstrap, counts=np.array([len(tokens) for tokens in logprobs]))


def _ngrams(ids: np.ndarray, n: int) -> np.ndarray:
    """A code for each n-gram, int64 [R - n + 1]."""
    ids, count = ids.astype(np.int64), max(0, len(ids) - n + 1)
    return sum((ids[i : i + count] << (_BITS * i) for i in range(n)), np.zeros(count, np.int64))


def _different(codes: np.ndarray, owners: np.ndarray, units: int) -> tuple[int, np.ndarray]:
    """The number of different codes, and for each owner the number of codes that no other owner has: int64 [units]."""
    order = np.lexsort((owners, codes))
    codes, owners = codes[order], owners[order]
    firsts = np.flatnonzero(np.diff(codes, prepend=codes[:1] - 1))  # where a new code begins
    lasts = np.append(firsts, len(codes))[1:] - 1
    alone = owners[firsts] == owners[lasts]
    return len(firsts), np.bincount(owners[firsts][alone], minlength=units)
