"""Rotary embeddings by each sequence's length, against each sequence alone in a newly loaded model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from common.model.files import load_policy
from common.model.packing import Sequences, response_logprobs
from common.model.reward_head import load_reward_model
from common.model.reward_scores import sequence_scores
from common.model.size import model_size
from common.model.small_model import randomise
from tests.fakes import save_tiny_model

CPU = {"dtype": torch.float32, "device": torch.device("cpu")}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
LENGTHS = [5, 30, 11, 1, 12, 40, 13]  # the original length is 12; longer sequences before and after shorter ones


@pytest.fixture(params=["longrope", "dynamic"])
def directory(request, tmp_path):
    save_tiny_model(tmp_path)  # for its tokenizer
    if request.param == "longrope":
        rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3, 5, 7, 9.0]}
        config = Phi3Config(
            **SIZES, rope_parameters=rope, max_position_embeddings=64, original_max_position_embeddings=12
        )
        randomise(Phi3ForCausalLM(config)).save_pretrained(tmp_path)
    else:
        rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
        randomise(
            LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope, max_position_embeddings=12))
        ).save_pretrained(tmp_path)
    return tmp_path


def alone(directory, ids):
    """Log-probabilities from a newly loaded model, which remembers no earlier sequence."""
    fresh = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return fresh(torch.from_numpy(ids)[None]).logits[0].log_softmax(-1)


def sequences():
    rng = np.random.default_rng(0)
    return [rng.integers(3, 64, size=length) for length in LENGTHS]


@torch.no_grad()
def test_packed_sequences_get_the_frequencies_of_their_own_length(directory):
    policy, rows = load_policy(directory, **CPU), sequences()
    packed = Sequences.pack([row[:1] for row in rows], [row[1:] for row in rows])
    for _ in range(2):  # the second pass must not depend on the first
        found = response_logprobs(policy, packed, temperature=1.0)
        for mine, row in zip(found, rows, strict=True):
            expected = alone(directory, row)[range(len(row) - 1), row[1:]]
            torch.testing.assert_close(mine[: len(row) - 1], expected, atol=2e-5, rtol=0)


@torch.no_grad()
def test_padding_does_not_change_a_score(directory):
    model = load_reward_model(directory, **CPU)
    torch.nn.init.normal_(model.score.weight)
    rows = sequences()
    padded = torch.zeros(len(rows), 48, dtype=torch.int64)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = torch.from_numpy(row)
    together = sequence_scores(model, padded, torch.tensor(LENGTHS))
    for score, row in zip(together, rows, strict=True):
        fresh = load_reward_model(directory, **CPU)
        fresh.score.weight.copy_(model.score.weight)
        body = fresh.base_model
        body.rotary_emb.__dict__.pop("forward")  # transformers' own
        state = body(input_ids=torch.from_numpy(row)[None], use_cache=False).last_hidden_state[0, -1]
        torch.testing.assert_close(score, model.score.weight[0] @ state, atol=2e-5, rtol=0)


def test_the_context_ends_where_engines_start_to_differ(directory):
    assert model_size(directory).context == 12
    assert AutoConfig.from_pretrained(directory).max_position_embeddings in (12, 64)
