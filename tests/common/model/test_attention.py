"""Packed attention against a dense float64 softmax of all tokens, in which sequences cannot see one another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from common.model import attention, recomputed_attention
from common.model.attention import PACKED, AttentionError, packed_attention
from common.model.lengths import Lengths
from common.model.packing import Sequences

HEAD_SIZE = 5
NEIGHBOURS = {
    "one sequence": [6],
    "ragged": [3, 7, 1, 4],
    "runs of equal length": [4, 4, 4, 2, 2, 4, 1, 1],
    "one token each": [1, 1, 1],
    "more tokens than a mask is cut from": [300, 3],
}


def inputs(lengths, heads=4, kv_heads=2, dtype=torch.float64):
    """query, key and value, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    count = sum(lengths)
    shapes = [(1, n, count, HEAD_SIZE) for n in (heads, kv_heads, kv_heads)] + [(1, count, heads, HEAD_SIZE)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def packed(query, key, value, gradient, lengths, *, scaling=0.4, window=None):
    """The output, and the gradients of the inputs."""
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    attended, weights = packed_attention(
        nn.Module(), *leaves, None, scaling=scaling, lengths=Lengths(lengths), sliding_window=window, dropout=0.0
    )
    assert weights is None
    return attended.detach(), *torch.autograd.grad(attended, leaves, gradient)


def dense(query, key, value, gradient, lengths, *, scaling=0.4, window=None):
    """The same in float64: one softmax over all N tokens, with the probability 0 for each that must not be seen."""
    leaves = [x[0].double().clone().requires_grad_() for x in (query, key, value)]
    q, k, v = leaves
    of = [sequence for sequence, length in enumerate(lengths) for _ in range(length)]
    allowed = torch.tensor(
        [[of[i] == of[j] and j <= i and (not window or i - j < window) for j in range(len(of))] for i in range(len(of))]
    )
    heads = []
    for head in range(len(q)):
        shared = head // (len(q) // len(k))  # neighbouring heads have keys and values in common
        weights = torch.where(allowed, torch.exp(scaling * q[head] @ k[shared].T), 0.0)
        heads.append(weights / weights.sum(-1, keepdim=True) @ v[shared])
    attended = torch.stack(heads, dim=1)
    return attended[None].detach(), *(g[None] for g in torch.autograd.grad(attended, leaves, gradient[0].double()))


def check(found, expected, atol):
    for name, one, other in zip(("attended", "query", "key", "value"), found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=atol, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("lengths", NEIGHBOURS.values(), ids=NEIGHBOURS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (4, 1), (3, 3)])
def test_values_and_gradients_equal_a_dense_derivation(lengths, heads, kv_heads):
    tensors = inputs(lengths, heads, kv_heads, torch.float32)
    check(packed(*tensors, lengths), dense(*tensors, lengths), atol=2e-5)


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 300])
def test_with_a_sliding_window_a_token_sees_itself_and_those_just_before(window):
    lengths = [3, 5, 5, 1, 4]
    tensors = inputs(lengths, dtype=torch.float32)
    check(packed(*tensors, lengths, window=window), dense(*tensors, lengths, window=window), atol=1e-5)


def test_windows_worked_by_hand():
    # All scores are 0, so a token takes the plain mean of the values it sees: 1, 2, 4, 8.
    zeros, value = torch.zeros(1, 1, 4, 1), torch.tensor([1.0, 2, 4, 8]).view(1, 1, 4, 1)

    def means(**how):
        return packed_attention(nn.Module(), zeros, zeros, value, None, scaling=1.0, **how)[0].flatten().tolist()

    assert means(lengths=Lengths([4])) == pytest.approx([1, 3 / 2, 7 / 3, 15 / 4])
    assert means(lengths=Lengths([2, 2])) == [1, 1.5, 4, 6]
    assert means(lengths=Lengths([4]), sliding_window=2) == [1, 1.5, 3, 6]
    assert means(lengths=Lengths([1, 1, 1, 1])) == [1, 2, 4, 8]
    assert means(lengths=Lengths([4]), sliding_window=1) == [1, 2, 4, 8]


def test_masks_of_different_windows_and_lengths_are_not_mixed_up():
    for lengths, window in (([3], 2), ([5, 4], 2), ([5, 4], 3), ([4, 5], None), ([260], 2), ([5], 2), ([5], None)):
        tensors = inputs(lengths, dtype=torch.float32)
        check(packed(*tensors, lengths, window=window), dense(*tensors, lengths, window=window), atol=2e-5)


# Scores of some models


def with_sinks(query, key, value, sinks, gradient, lengths, *, cap, window):
    """Each token of each head on its own in float64: its scores and its sink, one softmax, the sink's share dropped."""
    leaves = [x.double().clone().requires_grad_() for x in (query[0], key[0], value[0], sinks)]
    q, k, v, s = leaves
    rows = []
    for head in range(len(q)):
        shared = head // (len(q) // len(k))
        for end in torch.tensor(lengths).cumsum(0).tolist():
            begin = end - lengths[len(rows) % len(lengths)]
            part = []
            for t in range(begin, end):
                seen = slice(max(begin, t - window + 1) if window else begin, t + 1)
                scores = 0.4 * k[shared, seen] @ q[head, t]
                if cap:
                    scores = cap * torch.tanh(scores / cap)
                weights = torch.cat([scores, s[head, None]]).softmax(0)[:-1]
                part.append(weights @ v[shared, seen])
            rows.append(torch.stack(part))
    per_head = [torch.cat(rows[i : i + len(lengths)]) for i in range(0, len(rows), len(lengths))]
    attended = torch.stack(per_head, dim=1)
    return attended[None].detach(), *torch.autograd.grad(attended, leaves, gradient[0].double())


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("cap", [None, 0.7])
@pytest.mark.parametrize("width", [HEAD_SIZE, 3, 9])
def test_sinks_caps_and_value_widths_equal_a_token_by_token_derivation(cap, window, width):
    lengths = [3, 7, 1, 40]
    query, key, _, _ = inputs(lengths, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    value, gradient = (torch.randn(s, generator=generator) for s in ((1, 2, 51, width), (1, 51, 4, width)))
    sinks = torch.tensor([-1.0, 0.3, 2.0, 0.0])
    leaves = [x.clone().requires_grad_() for x in (query, key, value, sinks)]
    attended, _ = packed_attention(
        nn.Module(),
        *leaves[:3],
        None,
        scaling=0.4,
        lengths=Lengths(lengths),
        sliding_window=window,
        softcap=cap,
        s_aux=leaves[3],
    )
    found = attended.detach(), *torch.autograd.grad(attended, leaves, gradient)
    expected = with_sinks(query, key, value, sinks, gradient, lengths, cap=cap, window=window)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double().view(other.shape), other, atol=1e-5, rtol=0)


def test_groups_that_are_split_for_a_gpu_give_the_same(monkeypatch):
    """A GPU computes a group of similar lengths in parts: here of one sequence, and of two."""
    lengths = [3, 7, 40, 1, 33, 5]
    tensors = inputs(lengths, dtype=torch.float32)
    whole, sizes = packed(*tensors, lengths), []
    split = recomputed_attention._layout.__wrapped__
    for most in (1, 2 * 4 * 32 * 32):

        def layout(lengths, heads, kv_heads, device, _, most=most):
            made = split(lengths, heads, kv_heads, device, most)
            sizes.append(len(made.groups))
            return made

        monkeypatch.setattr(recomputed_attention, "_layout", layout)
        for one, other in zip(packed(*tensors, lengths), whole, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    assert sizes == [6, 6, 4, 4]  # forward and backward: four of up to 32 tokens in twos, two of up to 64 by themselves


def test_a_sink_worked_by_hand():
    # Scores 0 and a sink of ln 2: the first token gives 1 / (1 + 2) to itself, the second 1 / 4 to each of two.
    zeros, value = torch.zeros(1, 1, 2, 1), torch.tensor([3.0, 5.0]).view(1, 1, 2, 1)
    sink = torch.tensor([2.0]).log()
    out = packed_attention(nn.Module(), zeros, zeros, value, None, scaling=1.0, lengths=Lengths([2]), s_aux=sink)[0]
    assert out.flatten().tolist() == pytest.approx([1, 2])


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"lengths": None}, "do not pass `lengths`, the sizes of packed sequences, on to their attention"),
        ({"position_bias": torch.zeros(1)}, "its attention uses position_bias"),
        ({"dropout": 0.1}, "its attention uses dropout"),
        ({"is_causal": False}, "its attention uses is_causal"),
        ({"is_causal": True}, None),
        ({"position_bias": None, "position_ids": torch.zeros(1), "use_cache": False}, None),
    ],
)
def test_what_packed_attention_does_not_know_is_refused(asked, reason):
    zeros = torch.zeros(1, 1, 2, 1)

    def attend():
        return packed_attention(nn.Module(), zeros, zeros, zeros, None, **{"lengths": Lengths([2]), **asked})

    if reason is None:
        attend()
    else:
        with pytest.raises(AttentionError, match=reason):
            attend()


# Company


@pytest.mark.parametrize("lengths", [[3, 4, 2], [3, 3, 3], [1, 1, 1]], ids=str)
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_changing_one_sequence_changes_no_bit_of_the_others(lengths, changed):
    tensors = inputs(lengths, dtype=torch.float32)
    place = slice(sum(lengths[:changed]), sum(lengths[: changed + 1]))
    other = [x.clone() for x in tensors]
    for x in other[:3]:
        x[:, :, place] = 1e4 * torch.randn(x[:, :, place].shape)
    other[3][:, place] = 1e4
    keep = torch.ones(sum(lengths), dtype=torch.bool)
    keep[place] = False
    before, after = packed(*tensors, lengths), packed(*other, lengths)
    assert torch.equal(before[0][:, keep], after[0][:, keep])
    for one, two in zip(before[1:], after[1:], strict=True):
        assert torch.equal(one[:, :, keep], two[:, :, keep])
        assert not torch.equal(one[:, :, place], two[:, :, place]) or lengths[changed] == 1


def test_bf16_stays_near_float64():
    lengths = [3, 7, 7, 1, 40]
    tensors = inputs(lengths, dtype=torch.bfloat16)
    found = packed(*tensors, lengths)
    assert {x.dtype for x in found} == {torch.bfloat16}
    for one, other in zip(found, dense(*tensors, lengths), strict=True):
        assert (one.double() - other).norm() < 0.02 * other.norm()


def test_large_scores_do_not_overflow():
    lengths = [4, 3]
    query, key, value, gradient = inputs(lengths, dtype=torch.float32)
    for x in packed(100 * query, 100 * key, value, gradient, lengths):
        assert torch.isfinite(x).all()


def test_only_the_inputs_are_kept_for_the_backward_pass():
    lengths = [50, 50, 20]
    query, key, value, _ = (x.requires_grad_() for x in inputs(lengths, dtype=torch.float32))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        packed_attention(nn.Module(), query, key, value, None, scaling=1.0, lengths=Lengths(lengths))
    assert sum(x.numel() for x in kept) == query.numel() + key.numel() + value.numel()


# Whole models

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def save_model(kind, directory):
    torch.manual_seed(0)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    else:
        window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1} if "window" in kind else {}
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, **window))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", ["llama", "qwen2 with biases", "qwen2 with a sliding window"])
def test_a_packed_model_equals_eager_attention_on_each_sequence_alone(kind, tmp_path):
    save_model(kind, tmp_path)
    one, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation=how).eval()
        for how in (PACKED, "eager")
    )
    assert any(name.endswith("q_proj.bias") for name, _ in one.named_parameters()) == ("qwen2" in kind)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(64, size=n) for n in (3, 5, 5, 1, 1, 9)]
    responses = [rng.integers(64, size=n) for n in (4, 6, 6, 1, 0, 8)]
    states, token_ids = Sequences.pack(prompts, responses).response_states(one.base_model)
    assert token_ids.tolist() == np.concatenate(responses).tolist()
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        hidden = other.base_model(torch.from_numpy(np.concatenate([prompt, response]))[None]).last_hidden_state[0]
        expected.append(hidden[len(prompt) - 1 : -1])
    expected = torch.cat(expected)
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)

    pull = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    for model, hidden in ((one, states), (other, expected)):
        model.zero_grad()
        (hidden * pull).sum().backward()
    for (name, mine), theirs in zip(one.base_model.named_parameters(), other.base_model.parameters(), strict=True):
        scale = max(1.0, float(theirs.grad.abs().max()))
        assert float((mine.grad - theirs.grad).abs().max()) < 1e-5 * scale, name


def test_the_window_of_the_model_above_is_shorter_than_its_sequences(tmp_path):
    """Else the test above would say nothing of windows."""
    save_model("qwen2 with a sliding window", tmp_path)
    narrow, wide = (
        AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32, attn_implementation=PACKED, sliding_window=window
        ).eval()
        for window in (4, 64)
    )
    sequences = Sequences.pack([np.arange(9)], [np.arange(8)])
    found, without = (sequences.response_states(model.base_model)[0] for model in (narrow, wide))
    assert float((found - without).detach().abs().max()) > 0.1


@pytest.mark.parametrize(("window", "left"), [(None, -1), (9, -1), (8, 7), (3, 2)])
def test_flash_attention_gets_a_window_only_if_it_hides_tokens(window, left, monkeypatch):
    """Else its causal kernel would not be chosen. The meta device takes the path of GPUs."""
    windows = []

    def varlen_attn(q, k, v, *ends, window_size, **how):
        windows.append(window_size)
        return q

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    q, k, v = (torch.empty(1, heads, 15, 8, dtype=torch.bfloat16, device="meta") for heads in (4, 2, 2))
    packed_attention(nn.Module(), q, k, v, None, lengths=Lengths([9, 6]), sliding_window=window)
    assert windows == [(left, 0)]
