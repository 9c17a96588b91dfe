"""Padded batches against the same rows one at a time, unpadded, through a tiny random Llama."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common.sequences import LANES, Sequences, response_logprobs, token_batches

PROMPT_LENGTHS, RESPONSE_LENGTHS = [3, 1, 6, 2, 4], [4, 7, 0, 1, 5]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).float().eval()


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    return tuple([rng.integers(64, size=n, dtype=np.int32) for n in ns] for ns in (PROMPT_LENGTHS, RESPONSE_LENGTHS))


def test_responses_follow_prompts_and_padding_comes_last():
    arrays = [np.array([5, 6]), np.array([7])], [np.array([8, 9, 0]), np.array([0])]
    sequences = Sequences.pad(*arrays)
    assert sequences.input_ids[0].tolist() == [5, 6, 8, 9, 0]
    assert sequences.input_ids[1, :2].tolist() == [7, 0]
    assert sequences.input_ids.dtype == torch.int64
    assert sequences.prompt_lengths.tolist() == [2, 1]
    assert sequences.lengths.tolist() == [5, 2]
    assert sequences.response_lengths.tolist() == [3, 1]
    # From lengths, not from ids: token 0 counts where it was written.
    assert sequences.response_mask.tolist() == [[True, True, True], [True, False, False]]


def test_chosen_rows_are_cut_to_the_longest_of_them(pairs):
    rows = Sequences.pad(*pairs).rows(torch.tensor([3, 0]))
    alone = Sequences.pad([pairs[0][3], pairs[0][0]], [pairs[1][3], pairs[1][0]])
    for name in ("input_ids", "prompt_lengths", "lengths", "response_mask"):
        assert torch.equal(getattr(rows, name), getattr(alone, name))


def test_states_come_with_the_response_tokens_they_predict_row_after_row(model, pairs):
    sequences = Sequences.pad(*pairs)
    states, token_ids = sequences.response_states(model.base_model)
    assert states.shape == (sum(RESPONSE_LENGTHS), 32)
    assert token_ids.tolist() == np.concatenate(pairs[1]).tolist()
    scattered = sequences.scatter(token_ids)
    for row, response in zip(scattered.tolist(), pairs[1], strict=True):
        assert row == response.tolist() + [0] * (7 - len(response))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@torch.no_grad()
def test_a_padded_batch_gives_the_logprobs_of_each_row_alone(model, pairs, temperature):
    logprobs = response_logprobs(model, Sequences.pad(*pairs), temperature=temperature)
    assert logprobs.dtype == torch.float32
    for b, (prompt, response) in enumerate(zip(*pairs, strict=True)):
        ids = prompt.tolist() + response.tolist()
        full = torch.log_softmax(model(torch.tensor([ids])).logits[0].double() / temperature, -1)
        for t, token in enumerate(response.tolist()):
            before = full[len(prompt) + t - 1]  # what the model says after the prompt and t response tokens
            assert float(logprobs[b, t]) == pytest.approx(float(before[token]), abs=1e-5)
        assert logprobs[b, len(response) :].abs().sum() == 0


def test_ids_in_the_padding_change_neither_logprobs_nor_gradients(model, pairs):
    def result(padding):
        sequences = Sequences.pad(*pairs)
        for row, length in enumerate(sequences.lengths.tolist()):
            sequences.input_ids[row, length:] = padding
        model.zero_grad()
        logprobs = response_logprobs(model, sequences, temperature=1.0)
        logprobs.sum().backward()
        return [logprobs.detach().clone()] + [p.grad.clone() for p in model.parameters()]

    for found, expected in zip(result(63), result(0), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_batch_of_empty_responses_has_no_logprobs(model):
    sequences = Sequences.pad([np.array([1, 2]), np.array([3])], [np.array([], int), np.array([], int)])
    logprobs = response_logprobs(model, sequences, temperature=1.0)
    assert logprobs.shape == (2, 0)


@torch.no_grad()
def test_a_row_has_the_same_bits_in_any_company(model):
    """On one thread, as a reference process runs by default."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 60, rng.integers(1, 30)) for _ in range(24)]
    responses = [rng.integers(1, 60, rng.integers(1, 12)) for _ in range(24)]

    def logprobs(rows):
        pairs = [prompts[i] for i in rows], [responses[i] for i in rows]
        padded = response_logprobs(model, Sequences.pad(*pairs, multiple_of=LANES), temperature=1.0)
        return [row[: len(responses[i])] for row, i in zip(padded, rows, strict=True)]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        together = logprobs(range(24))
        for size in (1, 2, 5, 7, 13):
            apart = [row for first in range(0, 24, size) for row in logprobs(range(first, min(24, first + size)))]
            assert all(torch.equal(one, other) for one, other in zip(apart, together, strict=True)), size
    finally:
        torch.set_num_threads(threads)


def test_rows_of_like_length_share_a_batch():
    # Longest first: 9 alone is over 8; 4 and 4 fill 2 x 4; 3 and 1 take 2 x 3, and a third row would take 9.
    assert token_batches([3, 9, 1, 4, 4, 1], 8) == [[1], [3, 4], [0, 2], [5]]
    assert token_batches([], 8) == []


@pytest.mark.parametrize("max_tokens", [1, 7, 40, 64, 10_000])
def test_every_row_is_in_one_batch_and_no_batch_is_over_budget_unless_it_is_one_row(max_tokens):
    rng = np.random.default_rng(max_tokens)
    for _ in range(20):
        lengths = rng.integers(0, 50, size=rng.integers(1, 30)).tolist()
        batches = token_batches(lengths, max_tokens)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens
        assert len(batches) == 1 or max_tokens < 10_000  # 29 rows of 49 tokens fit
