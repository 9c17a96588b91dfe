"""Hand-written passes against plain torch in float64, and which modules of a model they replace."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from common.model import kernels
from common.model.attention import PACKED
from common.model.kernels import cast_linear, embedding, fused_rms_norm, gated_silu, install, rms_norm
from common.model.packing import Sequences

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
EPS = 1e-3  # large enough to change results visibly


def random(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def norm_by_definition(x, weight):
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)


def gate_by_definition(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


def run(function, tensors, pull):
    """Result and gradients of the sum of it times `pull`."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    result = function(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, pull.to(result.dtype))]


def check(function, definition, tensors, *, near=1e-6):
    """Values and all gradients, `near` each other relative to their size."""
    exact = [x.double() for x in tensors]
    pull = torch.randn(definition(*exact).shape, generator=torch.Generator().manual_seed(1))
    for found, expected in zip(run(function, tensors, pull), run(definition, exact, pull), strict=True):
        assert found.shape == expected.shape
        assert float((found.double() - expected).norm()) <= near * float(expected.norm())


SHAPES = [(7, 12), (2, 5, 12), (1, 12), (0, 12)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_rms_norm_and_its_gradients_equal_the_definition(shape):
    x, weight = random(shape, (12,))
    check(lambda x, weight: rms_norm(x, weight, EPS), norm_by_definition, [0.1 * x, 1 + weight])


def test_an_rms_norm_worked_by_hand():
    # mean(9, 16, 0, 0) = 6.25, whose root is 2.5.
    found = rms_norm(torch.tensor([[3.0, 4.0, 0.0, 0.0]]), torch.tensor([1.0, 2.0, 1.0, 1.0]), 0.0)
    torch.testing.assert_close(found, torch.tensor([[1.2, 3.2, 0.0, 0.0]]), atol=1e-6, rtol=0)


def test_an_rms_norm_of_zeros_has_a_finite_gradient():
    found, gradient = run(lambda x: rms_norm(x, torch.ones(4), 1e-6), [torch.zeros(2, 4)], torch.ones(2, 4))
    assert not found.any()
    torch.testing.assert_close(gradient, torch.full((2, 4), 1000.0), atol=1e-2, rtol=0)  # 1 / sqrt(eps)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_gated_silu_and_its_gradients_equal_the_definition(shape):
    gate, up = random(shape, shape)
    check(gated_silu, gate_by_definition, [2 * gate, up])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_linear_layer_equals_the_definition(shape, bias):
    tensors = random(shape, (5, 12), *([(5,)] if bias else []))

    def function(x, weight, bias=None):
        return cast_linear(x, weight, bias)

    def definition(x, weight, bias=0):
        return x @ weight.T + bias

    check(function, definition, tensors)
    if 0 not in shape:
        with torch.autocast("cpu", torch.bfloat16):
            assert function(*tensors).dtype == torch.bfloat16
            check(function, definition, tensors, near=0.01)


def test_under_autocast_gradients_have_the_types_of_their_tensors():
    for given in (torch.float32, torch.bfloat16):
        (x,) = random((7, 12), dtype=given)
        weight, bias = random((5, 12), (5,))
        with torch.autocast("cpu", torch.bfloat16):
            found = run(lambda *args: cast_linear(*args), [x, weight, bias], torch.ones(7, 5))
        assert [one.dtype for one in found] == [torch.bfloat16, given, torch.float32, torch.float32]


def test_a_bias_of_many_rows_is_summed_in_float32():
    """4097 times 1: adding ones in bf16 would stop at 256, and 4097 is 4096 in bf16."""
    weight, bias = torch.ones(1, 1), torch.zeros(1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        cast_linear(torch.ones(4097, 1), weight, bias).sum().backward()
    assert bias.grad.item() == 4097


def test_a_frozen_weight_gets_no_gradient_but_its_input_does():
    x, weight, bias = random((7, 12), (5, 12), (5,))
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        cast_linear(x, weight, bias).float().sum().backward()
    assert float((x.grad - weight.sum(0)).norm()) < 0.02 * float(x.grad.norm())
    assert weight.grad is None
    scale = torch.ones(12)
    y = x.detach().requires_grad_()
    rms_norm(y, scale, EPS).sum().backward()
    assert y.grad.abs().sum() > 0
    assert scale.grad is None


def kept_by(function, *tensors):
    """Number of values kept for the backward pass, by type."""
    kept: dict[torch.dtype, int] = {}

    def keep(x):
        kept[x.dtype] = kept.get(x.dtype, 0) + x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        function(*(x.clone().requires_grad_() for x in tensors))
    return kept


def test_the_tensors_kept_for_the_backward_pass_are_few():
    x, weight, bias = random((7, 12), (5, 12), (5,))
    with torch.autocast("cpu", torch.bfloat16):
        # The input in bf16, and the weight itself but no copy of it in bf16.
        assert kept_by(cast_linear, x, weight, bias) == {torch.bfloat16: 84, torch.float32: 60}
    half = x.bfloat16()
    # A norm's input, its weight, and a number for each row.
    assert kept_by(lambda x, w: rms_norm(x, w, EPS), half, torch.ones(12)) == {
        torch.bfloat16: 84,
        torch.float32: 12 + 7,
    }


def test_a_gated_silu_keeps_its_two_inputs_alone():
    (half,) = random((7, 12), dtype=torch.bfloat16)
    assert kept_by(gated_silu, half, half) == {torch.bfloat16: 168}


def test_a_gated_silu_of_bf16_inputs_stays_near_float64():
    tensors = random((40, 64), (40, 64), dtype=torch.bfloat16)
    check(gated_silu, gate_by_definition, tensors, near=0.01)
    assert {x.dtype for x in run(gated_silu, tensors, torch.ones(40, 64))} == {torch.bfloat16}


def test_a_norm_of_bf16_inputs_stays_near_float64():
    tensors = random((40, 64), (64,), dtype=torch.bfloat16)

    def function(x, weight):
        return rms_norm(x, weight, EPS)

    check(function, norm_by_definition, tensors, near=0.01)
    found = run(function, tensors, torch.ones(40, 64))
    assert {x.dtype for x in found} == {torch.bfloat16}


def test_a_norm_of_float16_inputs_is_computed_in_float32():
    """Squares of 300 and more overflow float16, and 256 + 1 is 256 in bf16."""
    x = torch.full((1, 512), 300.0, dtype=torch.float16)
    assert rms_norm(x, torch.ones(512), 0.0).tolist() == [[1.0] * 512]


# Which modules are replaced


def replaced(model):
    return {name for name, module in model.named_modules() if "forward" in vars(module)}


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize("begun", [False, True])
def test_an_embeddings_gradient_is_torchs_and_adds_to_an_existing_one(padding_idx, begun):
    ids, pull = torch.tensor([[3, 5, 5, 0, 3]]), torch.randn(1, 5, 8)
    weight = nn.Parameter(torch.randn(6, 8))
    other = nn.Parameter(weight.detach().clone())
    before = torch.randn(6, 8) if begun else torch.zeros(6, 8)
    if begun:
        weight.grad = before.clone()
    out = embedding(ids, weight, padding_idx)
    assert torch.equal(out, other[ids])
    (out * pull).sum().backward()
    (nn.functional.embedding(ids, other, padding_idx) * pull).sum().backward()
    torch.testing.assert_close(weight.grad, before + other.grad, atol=1e-6, rtol=0)
    assert padding_idx is None or torch.equal(weight.grad[3], before[3])


def test_a_llama_has_its_linear_layers_norms_and_gates_replaced():
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    layer = [
        *(f"self_attn.{x}_proj" for x in "qkvo"),
        *("mlp", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        *("input_layernorm", "post_attention_layernorm"),
    ]
    expected = {f"model.layers.{i}.{name}" for i in range(2) for name in layer} | {
        *("model.norm", "lm_head", "model.embed_tokens")
    }
    assert install(model) == len(expected)
    assert replaced(model) == expected


class GeluMLP(LlamaMLP):
    def __init__(self, config):
        super().__init__(config)
        self.act_fn = nn.GELU()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gelu_layer_with_tiny_outputs_is_not_replaced(dtype):
    mlp = GeluMLP(LlamaConfig(**SIZES)).to(dtype)
    nn.init.normal_(mlp.down_proj.weight, std=1e-4)
    install(mlp)
    assert "forward" not in vars(mlp)


class GatedNorm(LlamaRMSNorm):
    """A plain norm if it is called without a gate."""

    def forward(self, hidden_states, gate=None):
        out = super().forward(hidden_states)
        return out if gate is None else out * torch.sigmoid(gate)


def test_a_norm_that_may_get_a_gate_is_left_alone():
    norm = GatedNorm(12)
    install(norm)
    x, gate = random((2, 12), (2, 12))
    assert torch.equal(norm(x, gate), LlamaRMSNorm.forward(norm, x) * torch.sigmoid(gate))


class NeedyNorm(LlamaRMSNorm):
    def forward(self, packed):
        raise TypeError("not a tensor")


def test_a_module_that_fails_on_a_trial_is_left_alone():
    norm = NeedyNorm(12)
    assert install(norm) == 0


class ShiftedNorm(LlamaRMSNorm):
    """As Gemma's, under Llama's names."""

    def forward(self, hidden_states):
        return super().forward(hidden_states) + super().forward(hidden_states) / self.weight


class HalvedMLP(LlamaMLP):
    def forward(self, x):
        return super().forward(x) / 2


class BiasedLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class AdaptedLinear(nn.Linear):
    """Equal to a linear layer until it is trained."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.added = nn.Parameter(torch.zeros(sizes[1]))

    def forward(self, x):
        return super().forward(x) + self.added


def test_a_subclass_of_a_linear_layer_keeps_its_own_forward_pass():
    layer = AdaptedLinear(32, 32)
    assert install(layer) == 0
    nn.init.ones_(layer.added)
    x = torch.randn(3, 32)
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias + 1, atol=1e-6, rtol=1e-6)


def test_modules_that_compute_something_else_keep_their_forward_pass():
    torch.manual_seed(0)
    config, clipped = LlamaConfig(**SIZES), nn.Embedding(4, 32, max_norm=1.0)
    for module in (ShiftedNorm(32), BiasedLinear(32, 32), GemmaRMSNorm(32), nn.LayerNorm(32), clipped):
        x = torch.tensor([1, 2]) if module is clipped else torch.randn(3, 32)
        before = module(x)
        assert install(module) == 0
        assert torch.equal(module(x), before)
    for mlp in (GeluMLP(config), HalvedMLP(config)):
        x = torch.randn(3, 32)
        before = mlp(x)
        assert install(mlp) == 3  # its linear layers
        assert replaced(mlp) == {"gate_proj", "up_proj", "down_proj"}
        torch.testing.assert_close(mlp(x), before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["gemma", "gpt2"])
def test_a_model_with_other_norms_keeps_them_and_its_outputs(kind):
    torch.manual_seed(0)
    if kind == "gemma":
        model = GemmaForCausalLM(GemmaConfig(**SIZES)).eval()
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        before = model(ids).logits
        install(model)
        torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)
    plain = {name for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Embedding)}
    assert replaced(model) == plain


def tiny(kind):
    torch.manual_seed(0)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation=PACKED))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, attn_implementation=PACKED))
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model.eval()


def forward_and_backward(model, *, dtype=None):
    rng = np.random.default_rng(0)
    sequences = Sequences.pack(
        [rng.integers(64, size=n) for n in (3, 1, 7)], [rng.integers(64, size=n) for n in (4, 6, 2)]
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        states, _ = sequences.response_states(model.base_model)
        logits = model.lm_head(states).float()
    pull = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * pull).sum().backward()
    return [states.detach().float(), logits.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_whole_model_gives_the_same_with_and_without(kind):
    model = tiny(kind)
    other = copy.deepcopy(model)
    assert install(other) > 20
    for found, expected in zip(forward_and_backward(other), forward_and_backward(model), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_under_autocast_a_model_is_as_near_to_float32_as_without(kind):
    exact, plain, installed = tiny(kind), tiny(kind), tiny(kind)
    install(installed)
    truth = forward_and_backward(exact)
    errors = [
        [float((one - other).norm() / other.norm()) for one, other in zip(found, truth, strict=True)]
        for found in (forward_and_backward(model, dtype=torch.bfloat16) for model in (plain, installed))
    ]
    assert max(errors[1]) < 0.05
    assert np.mean(errors[1]) < 1.2 * np.mean(errors[0])
    assert all(p.grad.dtype == torch.float32 for p in installed.parameters())


def test_weights_that_change_after_installation_are_used():
    model = tiny("llama")
    install(model)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    fresh = LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation=PACKED)).eval()
    fresh.load_state_dict(model.state_dict())
    for found, expected in zip(forward_and_backward(model), forward_and_backward(fresh), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_the_norm_of_gpus_computes_what_the_norm_of_cpus_does(dtype, near):
    """torch's own kernel with the weight in the input's type, here on the CPU."""
    generator = torch.Generator().manual_seed(0)
    x, weight, pull = (torch.randn(shape, generator=generator) for shape in ((5, 7, 16), (16,), (5, 7, 16)))
    results = []
    for norm in (rms_norm, fused_rms_norm):
        inputs = x.to(dtype, copy=True).requires_grad_(), weight.clone().requires_grad_()
        out = norm(*inputs, 1e-5)
        assert out.dtype == dtype
        results.append((out, *torch.autograd.grad(out, inputs, pull.to(dtype))))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=near, rtol=near)


def test_a_norm_on_a_gpu_is_torchs_own_kernel(monkeypatch):
    """On tensors without values that claim to be on a GPU."""
    called = []
    monkeypatch.setattr(kernels, "fused_rms_norm", lambda x, weight, eps: called.append((weight.dtype, eps)) or x)
    with FakeTensorMode():
        rms_norm(torch.empty(4, 16, device="cuda", dtype=torch.bfloat16), torch.empty(16, device="cuda"), 1e-5)
    assert called == [(torch.float32, 1e-5)]
