"""Chosen log-probabilities and entropy against a softmax worked out in Python floats, and every gradient against plain
autograd in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.model.logprobs import Finish, chosen_logprobs

N, H, V = 7, 5, 11


def inputs(count=N, width=H, vocabulary=V, *, bias=True):
    torch.manual_seed(0)
    head = torch.nn.Linear(width, vocabulary, bias=bias)
    return torch.randn(count, width), torch.randint(vocabulary, (count,)), head


def log_softmax_by_hand(state, head, temperature):
    """Python floats: log(e^z_i / sum_j e^z_j) with z = logits / temperature."""
    logits = [
        sum(w * s for w, s in zip(row, state.tolist(), strict=True)) + b
        for row, b in zip(head.weight.tolist(), head.bias.tolist(), strict=True)
    ]
    total = math.fsum(math.exp(z / temperature) for z in logits)
    return [math.log(math.exp(z / temperature) / total) for z in logits]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("tile", [(1, V), (3, 4), (7, 1), (100, 100)])
@torch.no_grad()
def test_logprobs_and_entropy_equal_a_log_softmax_done_by_hand(temperature, tile):
    hidden, token_ids, head = inputs()
    logprobs, entropy = chosen_logprobs(hidden, token_ids, head, temperature=temperature, tile=tile)
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
    hidden, _, head = inputs(3)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.constant_(head.bias, 2.5)
    logprobs, entropy = chosen_logprobs(hidden, torch.tensor([0, 4, 10]), head, temperature=0.7)
    torch.testing.assert_close(entropy, torch.full((3,), math.log(V)), atol=1e-6, rtol=0)
    torch.testing.assert_close(logprobs, torch.full((3,), -math.log(V)), atol=1e-6, rtol=0)


def test_huge_logits_neither_overflow_nor_hide_the_likeliest_token():
    head = torch.nn.Linear(1, 3, bias=False)
    head.weight.data = torch.tensor([[0.0], [1e4], [-1e4]])
    hidden = torch.ones(2, 1, requires_grad=True)
    logprobs, entropy = chosen_logprobs(hidden, torch.tensor([1, 0]), head, temperature=1.0)
    assert logprobs.tolist() == [0.0, -1e4]
    assert entropy.tolist() == [0.0, 0.0]
    (logprobs + entropy).sum().backward()
    assert head.weight.grad.flatten().tolist() == [1.0, -1.0, 0.0]  # only the second token is not yet certain


# Gradients


def pulls(count):
    """Gradients of log-probabilities and of entropy, different for every token."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, generator=generator), torch.randn(count, generator=generator)


def backward(hidden, token_ids, head, *, of=("logprobs", "entropy"), **settings):
    """Values, and the gradients of a weighted sum of the outputs named in `of`."""
    hidden = hidden.clone().requires_grad_()
    results = dict(zip(("logprobs", "entropy"), chosen_logprobs(hidden, token_ids, head, **settings), strict=True))
    by_name = dict(zip(results, pulls(len(token_ids)), strict=True))
    sum((results[name] * by_name[name]).sum() for name in of).backward()
    return [*(x.detach() for x in results.values()), hidden.grad, *(p.grad for p in head.parameters())]


def derived(hidden, token_ids, head, *, of=("logprobs", "entropy"), temperature, finish=None):
    """The same in float64, from all logits at once."""
    leaves = [hidden.double().requires_grad_(), *(p.detach().double().requires_grad_() for p in head.parameters())]
    logits = leaves[0] @ leaves[1].T + (leaves[2] if len(leaves) > 2 else 0)
    if finish is not None:
        logits = finish.scale * logits
        if finish.cap is not None:
            logits = finish.cap * torch.tanh(logits / finish.cap)
    log_p = torch.log_softmax(logits / temperature, -1)
    results = {"logprobs": log_p[torch.arange(len(log_p)), token_ids], "entropy": -(log_p.exp() * log_p).sum(-1)}
    by_name = dict(zip(results, pulls(len(token_ids)), strict=True))
    sum((results[name] * by_name[name].double()).sum() for name in of).backward()
    return [*(x.detach() for x in results.values()), *(x.grad for x in leaves)]


def check(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 1.3])
@pytest.mark.parametrize("of", [("logprobs", "entropy"), ("logprobs",), ("entropy",)], ids="+".join)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_values_and_all_gradients_equal_plain_autograd(temperature, of, bias):
    tensors = inputs(bias=bias)
    expected = derived(*tensors, of=of, temperature=temperature)
    check(backward(*tensors, of=of, temperature=temperature, tile=(3, 4)), expected)


@pytest.mark.parametrize("finish", [Finish(3.0), Finish(cap=0.8), Finish(0.25, 0.1)], ids=str)
@pytest.mark.parametrize("of", [("logprobs", "entropy"), ("logprobs",)], ids="+".join)
def test_scaled_and_capped_logits_have_autograds_values_and_gradients(finish, of):
    tensors = inputs()
    settings = {"of": of, "temperature": 1.3, "finish": finish}
    check(backward(*tensors, **settings, tile=(3, 4)), derived(*tensors, **settings))


@pytest.mark.parametrize("count", [0, 1, 4, 5, 8, 9, 11])
@pytest.mark.parametrize("of", [("logprobs", "entropy"), ("logprobs",)], ids="+".join)
def test_any_number_of_tokens_fits_into_tiles(count, of):
    """None, fewer than a tile's 4, exactly one or two, and one more."""
    tensors = inputs(count)
    check(
        backward(*tensors, of=of, temperature=1.3, tile=(4, 5)),
        derived(*tensors, of=of, temperature=1.3),
    )


@pytest.mark.parametrize("count", [511, 512, 513])
def test_the_usual_tiles_change_nothing(count):
    tensors = inputs(count)
    check(backward(*tensors, temperature=0.8), derived(*tensors, temperature=0.8))


@pytest.mark.parametrize("vocabulary", [2047, 2048, 2049, 4097])
def test_a_vocabulary_of_several_parts_has_all_of_its_gradient(vocabulary):
    tensors = inputs(3, 2, vocabulary)
    check(backward(*tensors, temperature=1.0), derived(*tensors, temperature=1.0))


def test_parts_of_very_different_size_keep_the_small_one():
    """Tiles of one token each: exp(500) is beyond float32, exp(-500) below it."""
    head = torch.nn.Linear(1, 3, bias=False)
    head.weight.data = torch.tensor([[-500.0], [500.0], [499.0]])
    ids = torch.tensor([0, 1, 2])
    logprobs, entropy = chosen_logprobs(torch.ones(3, 1), ids, head, temperature=1.0, tile=(1, 1))
    p = 1 / (1 + math.exp(-1.0))
    expected = torch.tensor([-1000 + math.log(p), math.log(p), math.log(1 - p)])
    torch.testing.assert_close(logprobs, expected, rtol=1e-6, atol=1e-4)
    h = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    torch.testing.assert_close(entropy, torch.full((3,), h), rtol=0, atol=1e-4)


@pytest.mark.parametrize("tile", [(2, 3), (100, 100)])
def test_a_weight_that_has_a_gradient_keeps_it_beneath_the_new_one(tile):
    hidden, token_ids, head = inputs()
    expected = derived(hidden, token_ids, head, temperature=1.3)
    before = torch.full_like(head.weight, 3.0), torch.full_like(head.bias, -2.0)
    head.weight.grad, head.bias.grad = (x.clone() for x in before)
    held = head.weight.grad
    found = backward(hidden, token_ids, head, temperature=1.3, tile=tile)
    check(found, [*expected[:3], expected[3] + before[0], expected[4] + before[1]])
    assert head.weight.grad is held  # of the largest matrix there is no second gradient


def test_two_passes_over_one_head_add_up_in_one_backward_and_in_two():
    hidden, token_ids, head = inputs()
    expected = derived(hidden, token_ids, head, temperature=1.0)[3:]
    for together in (True, False):
        head.zero_grad(set_to_none=True)
        losses = []
        for rows in (slice(0, 3), slice(3, N)):
            values = chosen_logprobs(hidden[rows], token_ids[rows], head, temperature=1.0)
            losses.append(sum((x * pull[rows]).sum() for x, pull in zip(values, pulls(N), strict=True)))
        for loss in [sum(losses)] if together else losses:
            loss.backward()
        check([head.weight.grad, head.bias.grad], expected)


def test_a_weight_that_is_also_the_input_embedding_gets_both_gradients():
    _, token_ids, head = inputs(vocabulary=V, bias=False)
    asked = torch.tensor([1, 1, 4, 0, 10, 3, 3])
    exact = head.weight.detach().double().requires_grad_()
    log_p = torch.log_softmax(exact[asked] @ exact.T, -1)
    (log_p[torch.arange(N), token_ids] * pulls(N)[0].double()).sum().backward()
    for passes in (1, 2):  # the second time there is a gradient already
        logprobs, _ = chosen_logprobs(head.weight[asked], token_ids, head, temperature=1.0, tile=(2, 4))
        (logprobs * pulls(N)[0]).sum().backward()
        check([head.weight.grad], [passes * exact.grad])


@pytest.mark.parametrize("held", [False, True])
def test_a_frozen_head_gets_no_gradient_and_passes_one_on(held):
    hidden, token_ids, head = inputs()
    expected = derived(hidden, token_ids, head, temperature=1.3)
    head.requires_grad_(False)
    if held:
        head.weight.grad = torch.ones_like(head.weight)
    found = backward(hidden, token_ids, head, temperature=1.3, tile=(2, 4))
    check(found[:3], expected[:3])
    assert head.bias.grad is None
    assert head.weight.grad is None if not held else bool((head.weight.grad == 1).all())


def test_states_that_need_no_gradient_still_train_the_head():
    hidden, token_ids, head = inputs()
    expected = derived(hidden, token_ids, head, of=("logprobs",), temperature=1.0)
    logprobs, _ = chosen_logprobs(hidden, token_ids, head, temperature=1.0)
    (logprobs * pulls(N)[0]).sum().backward()
    check([head.weight.grad, head.bias.grad], expected[3:])


def test_the_gradient_of_a_logprob_is_one_hot_minus_probabilities():
    hidden, token_ids, head = inputs()
    logprobs, _ = chosen_logprobs(hidden, token_ids, head, temperature=1.3, tile=(2, 4))
    logprobs.sum().backward()
    rows = [log_softmax_by_hand(hidden[n], head, 1.3) for n in range(N)]
    for v in range(V):
        expected = math.fsum(((int(token_ids[n]) == v) - math.exp(rows[n][v])) / 1.3 for n in range(N))
        assert head.bias.grad[v].item() == pytest.approx(expected, abs=1e-5)


# Memory and precision


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in numbers; views of others are none."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [[x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)] for tree in (result, (args, kwargs))]
        given = {x.untyped_storage().data_ptr() for x in tensors[1]}
        for x in tensors[0]:
            if x.untyped_storage().data_ptr() not in given:
                self.size = max(self.size, x.numel())
        return result


def test_no_more_than_a_tile_of_logits_exists_and_none_is_kept():
    count, width, vocabulary, tile = 64, 4, 500, (16, 50)
    hidden, token_ids, head = inputs(count, width, vocabulary)
    hidden.requires_grad_()
    head.weight.grad, head.bias.grad = torch.zeros_like(head.weight), torch.zeros_like(head.bias)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        chosen_logprobs(hidden, token_ids, head, temperature=1.0, tile=tile)
    # The states, the head, the token ids, and two sums over the vocabulary.
    assert sum(x.numel() for x in kept) == count * width + vocabulary * (width + 1) + 3 * count
    with Largest() as largest:
        logprobs, entropy = chosen_logprobs(hidden, token_ids, head, temperature=1.0, tile=tile)
        (logprobs.sum() + entropy.sum()).backward()
    assert largest.size == math.prod(tile)


def test_a_second_backward_pass_gives_the_same():
    hidden, token_ids, head = inputs()
    hidden.requires_grad_()
    logprobs, _ = chosen_logprobs(hidden, token_ids, head, temperature=1.0, tile=(3, 4))
    first, second = (torch.autograd.grad(logprobs.sum(), hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_results_are_float32_and_no_tokens_give_no_results():
    hidden, token_ids, head = inputs()
    for n in (N, 0):
        results = chosen_logprobs(hidden[:n].bfloat16(), token_ids[:n], head.bfloat16(), temperature=1.0)
        assert [(r.dtype, r.shape) for r in results] == [(torch.float32, (n,))] * 2


def test_autocast_rounds_the_matrix_products_only():
    tensors = inputs(300, 32, 200)
    expected = derived(*tensors, temperature=0.7)
    with torch.autocast("cpu", torch.bfloat16):
        found = backward(*tensors, temperature=0.7)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert 0 < float((one.double() - other).norm()) < 0.02 * float(other.norm())
    # In bf16 an entropy near log 200 = 5.3 would be a multiple of 1/32.
    assert len(set(found[1].tolist())) > 200
