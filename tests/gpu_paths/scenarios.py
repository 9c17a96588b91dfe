"""Runs real code on fake CUDA tensors, and records the operations. Runs in the process of fake_gpu.py."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from common import weights
from common.config.ppo import PPOConfig
from common.model import attention, compiled_layers
from common.model.compiled_layers import compile_layers
from common.model.kernels import install
from common.model.packing import Sequences
from common.model.reward_scores import sequence_scores
from learner.ppo.credit import NewestPass
from learner.ppo.objective import objective
from learner.ppo.policy import PolicyWithCritic
from learner.ppo.targets import Targets

_DECODER = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "biases": ("qwen2", {}),
    "norms-of-queries": ("qwen3", {"head_dim": 16}),
    "window": ("mistral", {"sliding_window": 6}),
    "merged": ("phi3", {}),
    "alternating": (
        "gemma3_text",
        {"head_dim": 16, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "odd-heads": ("llama", {"head_dim": 20}),
    "wide-heads": ("llama", {"head_dim": 288}),
}
PROMPTS, RESPONSES = (3, 5), (6, 4)  # tokens of two sequences: 9 each
# Prompts and responses of several rows. Those of the last are shorter than the window above.
ROWS = [((9,), (9,)), (PROMPTS, RESPONSES), ((3, 5, 7), (6, 4, 9)), ((30,), (9,)), ((1, 1, 2), (2, 2, 2))]


WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")  # they read values


@dataclass
class Asked(TorchDispatchMode):
    """Operations by name; bytes that crossed between devices, by direction and type; reads that wait for the GPU."""

    operations: Counter[str] = field(default_factory=Counter)
    crossed: Counter[str] = field(default_factory=Counter)
    waits: list[str] = field(default_factory=list)
    products: set[str] = field(default_factory=set)  # the types of matrix products

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in WAITING and any(tensor.device.type == "cuda" for tensor in inputs):
            self.waits.append(name)
        result = function(*args, **(kwargs or {}))
        self.operations[name] += 1
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if name == "aten::mm":
            self.products.add(str(inputs[0].dtype))
        if name in ("aten::_to_copy", "aten::copy_"):
            # `copy_(target, source)` moves the source's type, and so does `_to_copy`: the cast comes after it.
            source, target = (inputs[-1], inputs[0]) if name == "aten::copy_" else (inputs[0], outputs[0])
            if source.device != target.device:
                direction = f"{source.device.type} to {target.device.type}"
                self.crossed[f"{direction}, {source.dtype}"] += source.numel() * source.element_size()
                if source.device.type == "cuda":
                    self.waits.append(name)
        return result


@contextmanager
def fake_gpu(dtype: torch.dtype | None = torch.bfloat16) -> Iterator[None]:
    """Tensors made in the block are fakes. Autocast is on as in the learner, with this type."""
    pin = Tensor.pin_memory
    Tensor.pin_memory = lambda self, *args: self  # type: ignore[method-assign] # fakes are nowhere
    torch.set_autocast_enabled("cuda", dtype is not None)  # torch.autocast would look for a real GPU
    torch.set_autocast_dtype("cuda", dtype or torch.bfloat16)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        Tensor.pin_memory = pin  # type: ignore[method-assign]
        torch.set_autocast_enabled("cuda", False)


def on_gpu(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


def moved(model: Any) -> Any:
    """The model with fake weights on the GPU."""
    shared: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = shared.setdefault(id(parameter), nn.Parameter(on_gpu(parameter)))
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = on_gpu(buffer)
    return model


def causal_model(kind: str) -> Any:
    model_type, settings = KINDS[kind]
    config = AutoConfig.for_model(model_type, **{**_DECODER, **settings}, attn_implementation="packed")
    model = AutoModelForCausalLM.from_config(config)
    install(model)
    return model


def packed(
    prompts: tuple[int, ...] = PROMPTS, responses: tuple[int, ...] = RESPONSES
) -> tuple[Sequences, Callable[[], Sequences]]:
    """Sequences on the CPU, and a function for the same on the fake GPU. Places are computed before, because they
    depend on values."""
    real = Sequences.pack([np.ones(n) for n in prompts], [np.ones(n) for n in responses])
    positions, (shape, cells) = real._positions, real._cells

    def fake() -> Sequences:
        found = replace(real, input_ids=on_gpu(real.input_ids))
        found.__dict__.update(_positions=tuple(map(on_gpu, positions)), _cells=(shape, on_gpu(cells)))
        return found

    return real, fake


@contextmanager
def attention_calls() -> Iterator[list[tuple[str, tuple[int, int]]]]:
    """The type and the window of every call of the packed kernel."""
    calls: list[tuple[str, tuple[int, int]]] = []
    kernel = attention.varlen_attn

    def noted(query: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((str(query.dtype), kwargs["window_size"]))
        return kernel(query, *args, **kwargs)

    attention.varlen_attn = noted
    try:
        yield calls
    finally:
        attention.varlen_attn = kernel


def micro_batch(kind: str, dtype: torch.dtype | None = torch.bfloat16) -> dict[str, Any]:
    """Forward pass, loss and backward pass of the learner."""
    model, (real, fake) = causal_model(kind), packed()
    mask = real.response_mask
    with fake_gpu(dtype), attention_calls() as calls:
        network, sequences = PolicyWithCritic(moved(model)), fake()
        fixed = Targets(**{name: on_gpu(mask if name == "mask" else mask.float()) for name in Targets.__annotations__})
        with Asked() as asked:
            logprobs, entropy, values = network(sequences, temperature=0.7)
            loss, _ = objective(logprobs, entropy, values, fixed, ppo=PPOConfig(), num_tokens=10)
            loss.backward()
        outputs = {f"{out.device}, {out.dtype}" for out in (logprobs, entropy, values, loss)}
        gradients = {f"{p.grad.device}, {p.grad.dtype}" for p in network.parameters() if p.grad is not None}
        without = [name for name, p in network.named_parameters() if p.grad is None]
    return {
        "attention": calls,
        "outputs": sorted(outputs),
        "gradients": sorted(gradients),
        "without_gradient": without,
        "waits": asked.waits,
        "crossed": dict(asked.crossed),
        "operations": dict(asked.operations),
        "products": sorted(asked.products),
    }


def compiled(kind: str, lengths: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> dict[str, Any]:
    """Compiled layers on packed rows of these prompts and responses: the number of graphs after each row, and how often
    the packed kernel is in each graph. No mode may record operations meanwhile: torch would not compile."""
    model, rows, in_graph = causal_model(kind), [packed(*each)[1] for each in lengths], []

    def noted(graph: Any, inputs: Any) -> Any:
        in_graph.append(sum("_varlen_attn" in str(node.target) for node in graph.graph.nodes))
        return graph

    compiled_layers.BACKEND = noted
    compiled_layers._error = lambda found, expected: 0.0  # fakes have no values
    graphs = []
    with fake_gpu():
        network = PolicyWithCritic(moved(model))
        compile_layers(network.policy)
        for row in rows:
            sequences = row()
            with torch.no_grad():
                network(sequences, temperature=0.7)
            logprobs, entropy, values = network(sequences, temperature=0.7)
            (logprobs.sum() + entropy.sum() + values.sum()).backward()
            graphs.append(len(in_graph))
        gradients = {f"{p.grad.device}, {p.grad.dtype}" for p in network.parameters()}
    return {"graphs": graphs, "in_graph": in_graph, "gradients": sorted(gradients)}


def publication() -> dict[str, Any]:
    """The weights of a policy on their way to the object store."""
    model = causal_model("llama")
    with fake_gpu(None):
        tensors = [(name, on_gpu(parameter)) for name, parameter in model.named_parameters()]
        sizes = []
        weights._bucket = lambda *args: sizes.append(len(args[-1]))  # type: ignore[assignment] # it reads values
        with Asked() as asked:
            for _ in weights.buckets(tensors, 0):
                pass
    return {"crossed": dict(asked.crossed), "values": sum(sizes), "parameters": sum(t.numel() for _, t in tensors)}


def credit() -> dict[str, Any]:
    """The log-probabilities of two minibatches, of one micro-batch each, on their way to RUN/credit."""
    with fake_gpu(None):
        newest = NewestPass(torch.Size((4, 6)), torch.device("cuda"))
        outputs = torch.ones(2, 5, device="cuda")
        with Asked() as learning:
            for rows in ([0, 3], [2, 1]):
                newest.begin(np.array(rows))
                newest.add(torch.tensor(rows), outputs, outputs)
        with Asked() as reading:
            newest.read()
    return {"learning": learning.waits, "reading": reading.waits, "crossed": dict(reading.crossed)}


def frozen() -> dict[str, Any]:
    """Log-probabilities under a model in bfloat16 without gradients, as the reference service computes them."""
    model, (_, fake) = causal_model("llama").bfloat16(), packed()
    with fake_gpu(None), attention_calls() as calls, torch.no_grad():
        network, sequences = PolicyWithCritic(moved(model), has_critic=False), fake()
        with Asked() as asked:
            logprobs, _, _ = network(sequences, temperature=0.7)
    return {"attention": calls, "outputs": [f"{logprobs.device}, {logprobs.dtype}"], "waits": asked.waits}


def reward() -> dict[str, Any]:
    """Scores of padded rows by a reward model, with their gradients, as its trainer computes them."""
    config = AutoConfig.for_model("llama", **_DECODER, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config)
    with fake_gpu():
        network = moved(model)
        ids, lengths = (torch.ones(shape, dtype=torch.int64, device="cuda") for shape in ((4, 16), (4,)))
        with Asked() as asked:
            scores = sequence_scores(network, ids, lengths)
            scores.sum().backward()
        gradients = {f"{p.grad.device}, {p.grad.dtype}" for p in network.parameters()}
    return {"outputs": [f"{scores.device}, {scores.dtype}"], "gradients": sorted(gradients), "waits": asked.waits}


def waits() -> dict[str, Any]:
    """Three ways to wait for a GPU."""
    with fake_gpu(None), Asked() as asked:
        values = torch.ones(sum(PROMPTS) + sum(RESPONSES), device="cuda")
        values.cpu()
        for read in (lambda: values[0].item(), values.nonzero):
            with suppress(DataDependentOutputException, DynamicOutputShapeException):  # fakes have no values
                read()
    return {"waits": asked.waits, "crossed": dict(asked.crossed)}


SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    **{kind: lambda kind=kind: micro_batch(kind) for kind in KINDS},  # type: ignore[misc]
    "float32": lambda: micro_batch("llama", None),
    "compiled": lambda: compiled("llama", ROWS),
    "compiled-window": lambda: compiled("window", ROWS),
    "publication": publication,
    "credit": credit,
    "frozen": frozen,
    "reward": reward,
    "waits": waits,
}


def main(names: str) -> None:
    """Prints one JSON object: the results of these scenarios, by name."""
    print(json.dumps({name: SCENARIOS[name]() for name in names.split(",")}), flush=True)
    os._exit(0)  # at a usual end, autograd's thread for the GPU would end the process by a signal
