"""Warnings about truncated sampling."""

import pytest

from common.config.actors import SamplingConfig
from deploy.evaluation.truncation import truncation_warnings


@pytest.mark.parametrize(
    ("sampling", "samples", "told"),
    [
        ({"temperature": 0.5}, 16, []),
        ({"top_p": 0.9}, 16, ["the reference ignores sampling.top_p, so"]),
        ({"top_p": 0.9, "top_k": 20}, 16, ["the reference ignores sampling.top_p and sampling.top_k, so"]),
        ({"top_k": 1}, 1, ["the reference ignores sampling.top_k, so"]),
        ({"top_k": 1}, 4, ["the reference ignores sampling.top_k, so", "so all 4 answers to a prompt are the same"]),
        ({"min_new_tokens": 2}, 1, ["the reference ignores sampling.min_new_tokens, so"]),
    ],
)
def test_truncation_is_warned_of(sampling, samples, told):
    found = truncation_warnings(SamplingConfig(**sampling), samples)
    assert len(found) == len(told)
    assert all(part in text for text, part in zip(found, told))
