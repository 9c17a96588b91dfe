"""Compiled layers against the layers themselves. torch's "eager" and "aot_eager" take the place of its compiler: they
trace the same graphs, and run them operation by operation. One test compiles."""

from __future__ import annotations

import copy
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common.config.ppo import LoRAConfig
from common.model.attention import PACKED
from common.model.compiled_layers import compile_layers
from common.model.kernels import install
from common.model.packing import Sequences
from common.model.recomputed_layers import checkpoint_activations
from learner.ppo import lora
from tests.common.model.model_kinds import tiny_config
from tests.tracing import graphs, trace_only

# Prompt and response lengths of each micro-batch. The window of these models is 5.
LONG = [[(9, 9)], [(3, 4), (5, 6), (1, 9)], [(4, 4), (4, 4), (4, 4), (4, 4)], [(30, 9), (3, 1)]]
SHORT = [[(1, 2), (2, 2)], [(2, 1)]]


@pytest.fixture(autouse=True)
def _without_compiler(monkeypatch):
    trace_only(monkeypatch)
    yield
    torch._dynamo.reset()


def pair(kind: str, **changes):
    """A tiny random model twice; the second one is compiled."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(tiny_config(kind, **changes), attn_implementation=PACKED).eval()
    other = copy.deepcopy(plain)
    install(plain), install(other)
    compile_layers(other)
    return plain, other


def results(model, lengths, dtype=torch.float32):
    """The states of a packed row, first without gradients, and the gradients of the parameters by name."""
    rng = np.random.default_rng(0)
    sequences = Sequences.pack(
        *zip(*((rng.integers(3, 60, p), rng.integers(3, 60, r)) for p, r in lengths), strict=True)
    )
    model.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        with torch.no_grad():
            quiet, _ = sequences.response_states(model.base_model)
        assert not quiet.requires_grad
        states, _ = sequences.response_states(model.base_model)
    (states.float() * torch.randn(states.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return quiet, states.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check_same(plain, other, batches, **how):
    for lengths in batches:
        (quiet, states, gradients), (other_quiet, other_states, found) = (
            results(m, lengths, **how) for m in (plain, other)
        )
        assert torch.equal(other_quiet, quiet)
        assert torch.equal(other_states, states)
        assert found.keys() == gradients.keys()
        assert all(torch.equal(found[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize(
    ("kind", "long", "all_lengths"),
    [
        ("llama", 1, 1),
        ("gpt2", 1, 1),
        ("mistral", 1, 2),  # a window that hides nothing is another graph
        ("gemma2", 2, 3),  # layers with and without window; scores with a cap
    ],
)
def test_one_graph_serves_all_layers_lengths_and_passes(kind, long, all_lengths, capsys):
    plain, other = pair(kind, num_hidden_layers=4)
    check_same(plain, other, LONG)
    assert graphs() == long
    check_same(plain, other, SHORT + LONG)
    assert graphs() == all_lengths
    assert capsys.readouterr().out == ""


def test_bf16_adapters_and_checkpointing_keep_every_bit(monkeypatch):
    """With the backward pass traced too. Under autocast it would round more than the layers themselves do."""
    trace_only(monkeypatch, "aot_eager")
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(tiny_config("llama"), attn_implementation=PACKED).eval()
    install(plain)
    lora.add(plain, LoRAConfig(rank=4, targets=("q_proj", "up_proj")), seed=0)
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    other = copy.deepcopy(plain)
    install(other)  # a copy's replaced passes still belong to the original's modules
    checkpoint_activations(other)
    compile_layers(other)
    check_same(plain, other, LONG[:2], dtype=torch.bfloat16)
    before = graphs()
    with lora.off(plain), lora.off(other), torch.no_grad():
        sequences = Sequences.pack([np.arange(9)], [np.arange(8)])
        without = [model_states(model, sequences) for model in (plain, other)]
    assert torch.equal(*without)
    assert graphs() - before <= 1


def model_states(model, sequences):
    return sequences.response_states(model.base_model)[0]


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_torchs_compiler_gives_the_same_to_rounding(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    trace_only(monkeypatch, "inductor")
    plain, other = pair("llama", num_hidden_layers=1)
    for lengths in LONG[:2]:
        (_, states, gradients), (quiet, other_states, found) = (results(m, lengths) for m in (plain, other))
        assert torch.equal(quiet, other_states)
        torch.testing.assert_close(other_states, states, atol=1e-5, rtol=0)
        for name, gradient in gradients.items():
            assert (found[name] - gradient).norm() < 1e-5 * gradient.norm(), name
    assert graphs() == 1


# Layers that stay as they are


def left(capsys) -> str:
    return capsys.readouterr().out.partition("learner.compile does not compile layers of the kind ")[2]


def test_layers_that_cannot_be_compiled_stay_as_they_are(monkeypatch, capsys):
    def fails(graph, inputs):
        raise RuntimeError("no compiler found")

    trace_only(monkeypatch, fails)
    plain, other = pair("llama")
    check_same(plain, other, LONG[:2])
    out = left(capsys)
    assert out.startswith("LlamaDecoderLayer: ")
    assert "no compiler found" in out
    assert out.count("\n") == 1


def test_layers_whose_results_would_change_stay_as_they_are(monkeypatch, capsys):
    trace_only(monkeypatch, lambda graph, inputs: lambda *args: tuple(1.2 * x for x in graph(*args)))
    plain, other = pair("llama")
    check_same(plain, other, LONG[:2])
    assert left(capsys).startswith("LlamaDecoderLayer: their compiled results have a relative error of 0.")


def test_layers_that_would_need_too_many_graphs_stay_as_they_are(capsys):
    plain, other = pair("mistral")
    with torch._dynamo.config.patch(recompile_limit=1):
        check_same(plain, other, LONG[:1] + SHORT[:1])
        assert "limit exceeded" in left(capsys)
        check_same(plain, other, LONG[:2])
    assert graphs() == 1
    assert left(capsys) == ""
