"""Tiny models of every type that docs/models.md lists.

Supported types have the values and gradients of transformers on each sequence alone; the others are refused with the
reason in the table.
"""

from __future__ import annotations

import re

import pytest
import torch

from common.model.kernels import install
from common.model.logprobs import Finish, chosen_logprobs
from common.model.packing import Sequences
from common.model.probe import UnsuitedModelError, eager_results
from common.model.small_model import random_model, try_small
from tests.common.model.model_kinds import listed, tiny_config

_LONG = {"short_factor": [1.0] * 4, "long_factor": [3.0, 5.0, 7.0, 9.0], "rope_theta": 1e4}
PLAIN: dict[str, tuple[str, dict]] = {
    kind: (kind, {}) for kind in listed("Supported") | listed("Computed, but not generated")
}
SPECIAL: dict[str, tuple[str, dict]] = {
    "OPT-350m": ("opt", {"word_embed_proj_dim": 16}),
    "longrope": (
        "phi3",
        {"rope_parameters": {"rope_type": "longrope", **_LONG}, "original_max_position_embeddings": 12},
    ),
    "dynamic rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "max_position_embeddings": 12},
    ),
    "a window in half of the layers": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
}
REFUSED = listed("Refused")


def logprobs_alone(model, sequences):
    """From all logits of each sequence alone, with transformers' own eager attention."""
    model.set_attn_implementation("eager")
    parts = []
    for ids in sequences.input_ids.split(sequences.lengths.tolist()):
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        parts.append(logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]])
    return torch.cat(parts)


def logprobs_packed(model, sequences):
    """With the learner's functions."""
    states, token_ids = sequences.response_states(model.base_model)
    head, finish = model.get_output_embeddings(), Finish.of(model.config)
    return chosen_logprobs(states, token_ids, head, temperature=1.0, finish=finish)[0]


def with_gradients(model, logprobs):
    """Log-probabilities, and the gradient of a random weighted sum of them for every parameter."""
    found = logprobs(model)
    model.zero_grad(set_to_none=True)
    pull = torch.randn(len(found), generator=torch.Generator().manual_seed(3))
    (found * pull).sum().backward()
    return found.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("kind", "changes"), [*PLAIN.values(), *SPECIAL.values()], ids=[*PLAIN, *SPECIAL])
def test_a_supported_model_has_the_results_of_each_sequence_alone(kind, changes):
    config = tiny_config(kind, **changes)
    model = random_model(config)
    sequences: Sequences = eager_results(model).sequences
    expected, slow = with_gradients(model, lambda m: logprobs_alone(m, sequences))
    model.set_attn_implementation("packed")
    install(model)
    found, fast = with_gradients(model, lambda m: logprobs_packed(m, sequences))
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, atol=1e-5 * scale, rtol=0)
    size = max(float(gradient.abs().max()) for gradient in slow.values())
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for name in slow.keys() | fast.keys():  # an unused expert may have zeros or no gradient
        one, other = fast.get(name, zeros[name]), slow.get(name, zeros[name])
        assert float((one - other).abs().max()) < 2e-5 * size, name


@pytest.mark.parametrize(("kind", "reason"), REFUSED.items(), ids=REFUSED)
def test_an_unsupported_model_is_refused_with_its_reason(kind, reason):
    with pytest.raises(UnsuitedModelError, match=re.escape(reason)):
        try_small(tiny_config(kind), install)


def test_no_type_is_in_both_tables():
    assert len(PLAIN) > 70
    assert len(REFUSED) > 40
    assert not PLAIN.keys() & REFUSED.keys()


def test_a_window_that_is_only_in_the_mask_is_refused():
    with pytest.raises(UnsuitedModelError):
        try_small(tiny_config("phimoe", sliding_window=5))
