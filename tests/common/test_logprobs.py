"""Chosen log-probabilities and entropy against a softmax worked out in Python floats."""

import math

import pytest
import torch

from common.logprobs import chosen_logprobs

N, H, V = 7, 5, 11


def inputs():
    torch.manual_seed(0)
    return torch.randn(N, H), torch.randint(V, (N,)), torch.nn.Linear(H, V)


def log_softmax_by_hand(state, head, temperature):
    """Python floats: log(e^z_i / sum_j e^z_j) with z = logits / temperature."""
    logits = [
        sum(w * s for w, s in zip(row, state.tolist(), strict=True)) + b
        for row, b in zip(head.weight.tolist(), head.bias.tolist(), strict=True)
    ]
    total = math.fsum(math.exp(z / temperature) for z in logits)
    return [math.log(math.exp(z / temperature) / total) for z in logits]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@torch.no_grad()
def test_logprobs_and_entropy_equal_a_log_softmax_done_by_hand(temperature, chunk):
    hidden, token_ids, head = inputs()
    logprobs, entropy = chosen_logprobs(hidden, token_ids, head, temperature=temperature, chunk=chunk)
    assert logprobs.shape == entropy.shape == (N,)
    for n in range(N):
        row = log_softmax_by_hand(hidden[n], head, temperature)
        assert float(logprobs[n]) == pytest.approx(row[int(token_ids[n])], abs=1e-5)
        assert float(entropy[n]) == pytest.approx(-math.fsum(math.exp(lp) * lp for lp in row), abs=1e-5)


def test_temperature_divides_the_logits():
    # logits (0, ln 9) at temperature 2 are (0, ln 3): probabilities 1/4 and 3/4.
    head = torch.nn.Linear(1, 2, bias=False)
    head.weight.data = torch.tensor([[0.0], [math.log(9)]])
    logprobs, entropy = chosen_logprobs(torch.ones(2, 1), torch.tensor([0, 1]), head, temperature=2.0)
    expected = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    torch.testing.assert_close(logprobs, torch.tensor([math.log(0.25), math.log(0.75)]), atol=1e-6, rtol=0)
    torch.testing.assert_close(entropy, torch.tensor([expected, expected]), atol=1e-6, rtol=0)


def test_a_flat_distribution_has_the_entropy_log_v():
    logprobs, entropy = chosen_logprobs(
        torch.randn(3, H), torch.tensor([0, 4, 10]), lambda x: x.new_zeros(len(x), V), temperature=0.7
    )
    torch.testing.assert_close(entropy, torch.full((3,), math.log(V)), atol=1e-6, rtol=0)
    torch.testing.assert_close(logprobs, torch.full((3,), -math.log(V)), atol=1e-6, rtol=0)


def gradients(chunk):
    hidden, token_ids, head = inputs()
    hidden.requires_grad_()
    logprobs, entropy = chosen_logprobs(hidden, token_ids, head, temperature=1.3, chunk=chunk)
    pull = torch.arange(1.0, N + 1)  # a different gradient for every token
    ((logprobs * pull).sum() + 0.5 * (entropy * pull.flip(0)).sum()).backward()
    return [logprobs.detach(), entropy.detach(), hidden.grad, head.weight.grad, head.bias.grad]


@pytest.mark.parametrize("chunk", [1, 2, 3, 6])
def test_chunks_change_neither_values_nor_gradients(chunk):
    for found, expected in zip(gradients(chunk), gradients(N), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_gradient_of_a_logprob_is_one_hot_minus_probabilities_over_temperature():
    hidden, token_ids, head = inputs()
    logprobs, _ = chosen_logprobs(hidden, token_ids, head, temperature=1.3, chunk=2)
    logprobs.sum().backward()
    rows = [log_softmax_by_hand(hidden[n], head, 1.3) for n in range(N)]
    for v in range(V):
        expected = math.fsum(((int(token_ids[n]) == v) - math.exp(rows[n][v])) / 1.3 for n in range(N))
        assert head.bias.grad[v].item() == pytest.approx(expected, abs=1e-5)


def test_logits_exist_for_one_chunk_only_and_the_backward_pass_makes_them_again():
    hidden, token_ids, linear = inputs()
    seen = []

    def head(states):
        seen.append(len(states))
        return linear(states)

    logprobs, _ = chosen_logprobs(hidden, token_ids, head, temperature=1.0, chunk=3)
    assert seen == [3, 3, 1]
    logprobs.sum().backward()
    assert sorted(seen[3:]) == [1, 3, 3]


def test_results_are_float32_and_no_tokens_give_no_results():
    hidden, token_ids, head = inputs()
    for n in (N, 0):
        results = chosen_logprobs(hidden[:n].bfloat16(), token_ids[:n], head.bfloat16(), temperature=1.0)
        assert [(r.dtype, r.shape) for r in results] == [(torch.float32, (n,))] * 2
