"""Packed sequences against the same sequences one by one, through a tiny random Llama."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from common.model import packing
from common.model.attention import PACKED
from common.model.lengths import Lengths
from common.model.packing import ROW_MULTIPLE, Sequences, response_logprobs

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
        attn_implementation=PACKED,
    )
    return LlamaForCausalLM(config).float().eval()


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    return tuple([rng.integers(64, size=n, dtype=np.int32) for n in ns] for ns in (PROMPT_LENGTHS, RESPONSE_LENGTHS))


def check_equal(found, expected):
    for name in ("input_ids", "prompt_lengths", "lengths", "response_mask"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_a_response_follows_its_prompt_and_the_next_prompt_the_response():
    sequences = Sequences.pack([np.array([5, 6]), np.array([7])], [np.array([8, 9, 0], np.int32), np.array([0])])
    assert sequences.input_ids.tolist() == [5, 6, 8, 9, 0, 7, 0]
    assert sequences.input_ids.dtype == torch.int64
    assert sequences.prompt_lengths.tolist() == [2, 1]
    assert sequences.lengths.tolist() == [5, 2]
    assert sequences.response_lengths.tolist() == [3, 1]
    # From lengths, not from ids: token 0 counts where it was written.
    assert sequences.response_mask.tolist() == [[True, True, True], [True, False, False]]


@pytest.mark.parametrize("empty", [0, 1])
def test_a_prompt_without_tokens_is_refused(empty):
    prompts = [np.array([1]), np.array([2])]
    prompts[empty] = np.array([], dtype=np.int32)
    with pytest.raises(ValueError, match="a prompt without tokens cannot be answered"):
        Sequences.pack(prompts, [np.array([3]), np.array([4])])


def test_every_prompt_has_a_response():
    with pytest.raises(ValueError, match="zip"):
        Sequences.pack([np.array([1])], [])


@pytest.mark.parametrize("rows", [[3, 0], [2], [4, 3, 2, 1, 0], [1, 1]], ids=str)
def test_chosen_rows_are_those_sequences_in_that_order(pairs, rows):
    chosen = Sequences.pack([pairs[0][i] for i in rows], [pairs[1][i] for i in rows])
    check_equal(Sequences.pack(*pairs).rows(torch.tensor(rows)), chosen)


def test_no_rows_are_no_tokens(pairs):
    nothing = Sequences.pack(*pairs).rows(torch.tensor([], dtype=torch.int64))
    assert (nothing.input_ids.tolist(), nothing.lengths.tolist()) == ([], [])
    assert nothing.input_ids.dtype == torch.int64


def test_scattered_values_stand_at_their_tokens_with_zeros_behind(pairs):
    sequences = Sequences.pack(*pairs)
    flat = torch.arange(1.0, 18.0, requires_grad=True)
    scattered = sequences.scatter(flat)
    assert scattered.tolist() == [
        [1, 2, 3, 4, 0, 0, 0],
        [5, 6, 7, 8, 9, 10, 11],
        [0, 0, 0, 0, 0, 0, 0],
        [12, 0, 0, 0, 0, 0, 0],
        [13, 14, 15, 16, 17, 0, 0],
    ]
    weights = torch.arange(35.0).view(5, 7)
    (scattered * weights).sum().backward()
    assert flat.grad.tolist() == weights[sequences.response_mask].tolist()


def test_states_come_with_the_response_tokens_they_predict(model, pairs):
    sequences = Sequences.pack(*pairs)
    states, token_ids = sequences.response_states(model.base_model)
    assert token_ids.tolist() == np.concatenate(pairs[1]).tolist()
    first = 0
    for prompt, response in zip(*pairs, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt, response])).long()
        alone = model.base_model(ids[None], lengths=Lengths([len(ids)])).last_hidden_state[0]
        # The first response token comes from the state of the last prompt token.
        expected = alone[len(prompt) - 1 : len(prompt) - 1 + len(response)]
        torch.testing.assert_close(states[first : first + len(response)], expected, atol=1e-5, rtol=0)
        first += len(response)
    assert first == len(states)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@torch.no_grad()
def test_a_packed_batch_gives_the_logprobs_of_each_sequence_alone(model, pairs, temperature):
    logprobs = response_logprobs(model, Sequences.pack(*pairs), temperature=temperature)
    assert logprobs.dtype == torch.float32
    for b, (prompt, response) in enumerate(zip(*pairs, strict=True)):
        ids = prompt.tolist() + response.tolist()
        full = torch.log_softmax(
            model(torch.tensor([ids]), lengths=Lengths([len(ids)])).logits[0].double() / temperature, -1
        )
        for t, token in enumerate(response.tolist()):
            before = full[len(prompt) + t - 1]  # the model's logits after the prompt and t response tokens
            assert float(logprobs[b, t]) == pytest.approx(float(before[token]), abs=1e-5)
        assert logprobs[b, len(response) :].abs().sum() == 0


def test_the_order_of_sequences_changes_neither_logprobs_nor_gradients(model, pairs):
    def result(order):
        model.zero_grad()
        sequences = Sequences.pack(*pairs).rows(torch.tensor(order))
        logprobs = response_logprobs(model, sequences, temperature=1.0)
        (logprobs * logprobs.detach().cos()).sum().backward()  # a gradient of its own for every token
        back = torch.argsort(torch.tensor(order))
        return [logprobs.detach()[back]] + [p.grad.clone() for p in model.parameters()]

    expected = result([0, 1, 2, 3, 4])
    assert float(expected[-1].norm()) > 1
    for order in ([4, 3, 2, 1, 0], [2, 0, 3, 1, 4]):
        for found, one in zip(result(order), expected, strict=True):
            torch.testing.assert_close(found, one, atol=1e-5, rtol=1e-5)


def test_tokens_of_one_sequence_do_not_touch_the_logprobs_of_another(model, pairs):
    def logprobs():
        return response_logprobs(model, Sequences.pack(*pairs), temperature=1.0)

    with torch.no_grad():
        before = logprobs()
        pairs[0][1][:] += 1
        pairs[1][4][:] += 1
        after = logprobs()
    changed = (before != after).any(1).tolist()
    assert changed == [False, True, False, False, True]


def test_a_batch_of_empty_responses_has_no_logprobs(model):
    sequences = Sequences.pack([np.array([1, 2]), np.array([3])], [np.array([], int), np.array([], int)])
    logprobs = response_logprobs(model, sequences, temperature=1.0)
    assert logprobs.shape == (2, 0)


@torch.no_grad()
def test_logprobs_are_float32_under_autocast_and_near_the_exact_ones(model, pairs):
    sequences = Sequences.pack(*pairs)
    exact = response_logprobs(model, sequences, temperature=1.0)
    seen = []
    hook = model.base_model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = response_logprobs(model, sequences, temperature=1.0)
    hook.remove()
    assert seen == [torch.bfloat16]  # the residual stream is not float32
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    assert float((rounded - exact).norm()) < 0.05 * float(exact.norm())


@torch.no_grad()
def test_a_sequence_of_whole_lanes_has_the_same_bits_in_any_company(model):
    """On one thread, as a reference process runs by default."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 60, rng.integers(1, 30)) for _ in range(24)]
    responses = [rng.integers(1, 60, rng.integers(1, 12)) for _ in range(24)]
    lanes = [np.pad(r, (0, -(len(p) + len(r)) % ROW_MULTIPLE)) for p, r in zip(prompts, responses, strict=True)]

    def logprobs(rows):
        packed = Sequences.pack([prompts[i] for i in rows], [lanes[i] for i in rows])
        found = response_logprobs(model, packed, temperature=1.0)
        return [row[: len(responses[i])] for row, i in zip(found, rows, strict=True)]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        together = logprobs(range(24))
        for size in (1, 2, 5, 7, 13):
            apart = [row for first in range(0, 24, size) for row in logprobs(range(first, min(24, first + size)))]
            assert all(torch.equal(one, other) for one, other in zip(apart, together, strict=True)), size
    finally:
        torch.set_num_threads(threads)


class Echo(nn.Module):
    """A body whose states are its input embeddings."""

    def __init__(self, device):
        super().__init__()
        self.embedding = nn.Embedding(64, 8, device=device)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, *, inputs_embeds, position_ids, use_cache, lengths):
        return SimpleNamespace(last_hidden_state=inputs_embeds)


def test_states_and_scores_take_their_places_without_reading_the_device(pairs, monkeypatch):
    """The meta device has no values: reading one is an error there, where a GPU would make the host wait."""
    monkeypatch.setattr(packing, "autocast_dtype", lambda device: None)
    sequences = Sequences.pack(*pairs).to(torch.device("meta"))
    assert (sequences.input_ids.device.type, sequences.lengths.device.type) == ("meta", "cpu")
    states, token_ids = sequences.response_states(Echo("meta"))
    assert (states.shape, token_ids.shape) == ((sum(RESPONSE_LENGTHS), 8), (sum(RESPONSE_LENGTHS),))
    assert sequences.scatter(states[:, 0]).shape == (len(RESPONSE_LENGTHS), max(RESPONSE_LENGTHS))
    states.sum().backward()


# An environment's tokens inside responses: of 4, 7, 0, 1 and 5 tokens the policy sampled those that are True.
MASKS = [
    np.array([True, False, False, True]),
    np.array([True, True, False, True, False, False, True]),
    np.array([], dtype=bool),
    np.array([True]),
    np.array([True, True, True, False, False]),  # the episode ended after an answer of the environment
]


def test_tokens_of_an_environment_have_no_place_in_a_response():
    masks = [np.array([True, False, True]), np.array([True])]
    sequences = Sequences.pack([np.array([5, 6]), np.array([7])], [np.array([8, 9, 0]), np.array([0])], masks)
    assert sequences.input_ids.tolist() == [5, 6, 8, 9, 0, 7, 0]
    assert sequences.lengths.tolist() == [5, 2]
    assert sequences.response_lengths.tolist() == [2, 1]
    assert sequences.response_mask.tolist() == [[True, True], [True, False]]
    assert sequences.scatter(torch.tensor([1.0, 2.0, 3.0])).tolist() == [[1, 2], [3, 0]]
    with pytest.raises(ValueError, match="6 places in prompts and masks"):
        Sequences.pack(
            [np.array([5, 6]), np.array([7])], [np.array([8, 9, 0]), np.array([0])], [masks[0][1:], masks[1]]
        )


@torch.no_grad()
def test_logprobs_of_sampled_tokens_are_those_of_the_whole_response(model, pairs):
    whole = response_logprobs(model, Sequences.pack(*pairs), temperature=0.7)
    some = response_logprobs(model, Sequences.pack(*pairs, MASKS), temperature=0.7)
    assert some.shape == (5, 4)
    for b, mask in enumerate(MASKS):
        kept = whole[b, : len(mask)][torch.from_numpy(mask)]
        torch.testing.assert_close(some[b, : len(kept)], kept, atol=1e-5, rtol=0)
        assert some[b, len(kept) :].abs().sum() == 0


@pytest.mark.parametrize("rows", [[3, 0], [2], [4, 3, 2, 1, 0], [1, 1]], ids=str)
def test_chosen_rows_keep_their_holes(pairs, rows):
    chosen = Sequences.pack(*([parts[i] for i in rows] for parts in (*pairs, MASKS)))
    found = Sequences.pack(*pairs, MASKS).rows(torch.tensor(rows))
    check_equal(found, chosen)
    assert found.sampled.tolist() == chosen.sampled.tolist()
    assert found.response_lengths.tolist() == [int(MASKS[i].sum()) for i in rows]


# Places in the same responses where an environment's tokens are a new prompt.
STARTS = [[1], [2, 4], [], [], [3]]


def test_a_new_prompt_inside_a_response_begins_a_context_of_its_own():
    masks = [np.array([True, False, False, True, False, True]), np.array([True])]
    responses = [np.array([8, 9, 4, 0, 3, 2]), np.array([0])]
    sequences = Sequences.pack([np.array([5, 6]), np.array([7])], responses, masks, [[1, 4], []])
    assert sequences.lengths.tolist() == [8, 2]
    assert sequences.contexts.tolist() == [3, 1]
    assert sequences.context_lengths.tolist() == [3, 3, 2, 2]
    assert sequences.context_response_lengths.tolist() == [1, 1, 1, 1]
    assert sequences.response_lengths.tolist() == [3, 1]
    positions, places = sequences._positions
    assert positions.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 0, 1]
    assert places.tolist() == [2, 5, 7, 9]
    assert sequences._packed_lengths.each == (3, 3, 2, 2)
    assert sequences.response_mask.tolist() == [[True, True, True], [True, False, False]]


@pytest.mark.parametrize(
    ("starts", "reason"),
    [
        ([0], "a new prompt begins at place 0 with a token that the policy sampled"),
        ([1, 3], "a new prompt begins at place 3 with a token"),
        ([2, 1], r"must begin one after another in a response of 4, not at \[2, 1\]"),
        ([1, 1], "must begin one after another"),
        ([4], "must begin one after another"),
        ([-2], "must begin one after another"),
    ],
)
def test_a_new_prompt_that_cannot_be_one_is_refused(starts, reason):
    with pytest.raises(ValueError, match=reason):
        Sequences.pack([np.array([5])], [np.array([8, 9, 0, 1])], [MASKS[0]], [starts])


@torch.no_grad()
def test_logprobs_of_a_context_are_those_of_a_pass_over_it_alone(model, pairs):
    found = response_logprobs(model, Sequences.pack(*pairs, MASKS, STARTS), temperature=0.7)
    for b, (prompt, response) in enumerate(zip(*pairs, strict=True)):
        expected = []
        for first, end in pairwise([0, *STARTS[b], len(response)]):
            ids, sampled = response[first:end], MASKS[b][first:end]
            if first == 0:
                ids, sampled = np.concatenate([prompt, ids]), np.concatenate([np.zeros(len(prompt), bool), sampled])
            alone = Sequences.pack([ids[:1]], [ids[1:]], [sampled[1:]])
            expected += response_logprobs(model, alone, temperature=0.7)[0].tolist()
        assert found[b, : len(expected)].tolist() == pytest.approx(expected, abs=1e-5)
        assert found[b, len(expected) :].abs().sum() == 0


@pytest.mark.parametrize("rows", [[3, 0], [2], [4, 3, 2, 1, 0], [1, 1]], ids=str)
def test_chosen_rows_keep_their_contexts(pairs, rows):
    chosen = Sequences.pack(*([parts[i] for i in rows] for parts in (*pairs, MASKS, STARTS)))
    found = Sequences.pack(*pairs, MASKS, STARTS).rows(torch.tensor(rows))
    check_equal(found, chosen)
    for name in ("contexts", "context_lengths", "context_response_lengths"):
        assert getattr(found, name).tolist() == getattr(chosen, name).tolist()
