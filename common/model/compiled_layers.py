"""Transformer layers compiled by torch.compile: a few fused kernels replace many small ones, which a GPU finishes
faster than Python can start them. Runs in every learner or reward-model rank.

A layer becomes one graph, for all sizes. All layers of a kind share it, and so do all passes. A layer's hooks, such as
those of FSDP, and gradient checkpointing stay outside of the graph, and so does everything that is not a layer:
embeddings, the last norm, log-probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from common.model.logprobs import autocast_dtype

BACKEND: str | Callable[..., Any] = "inductor"
# Largest accepted error of a compiled layer, relative to the size of its result. Measured on tiny models on a CPU:
# 0.005 in bfloat16, where a graph rounds less often than separate kernels do. A wrong graph would be off by about 1.
_EXACT, _COARSE = 1e-3, 0.05


def compile_layers(model: PreTrainedModel) -> None:
    """Makes each kind of layer compile when it is first called, which takes seconds.

    A kind that cannot be compiled, or whose results would change, stays as it is. A printed line says why.
    """
    # By default, torch would trace the backward pass with autocast on, and so round products that must be float32.
    torch._functorch.config.backward_pass_autocast = "off"
    kinds: dict[tuple[type[nn.Module], ...], _Kind] = {}
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):  # transformers' class for one layer of a model
            parts = tuple(type(part) for part in layer.modules())
            layer.forward = _CompiledForward(layer.forward, kinds.setdefault(parts, _Kind(type(layer).__name__)))


class _Kind:
    """Layers that consist of the same modules. They share whether compiled passes are used."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tried = self.refused = False

    def refuse(self, reason: object) -> None:
        """From now on these layers are not compiled."""
        self.tried = self.refused = True
        text = " ".join(str(reason).split())[:300]
        print(f"learner.compile does not compile layers of the kind {self.name}: {text}", flush=True)


class _CompiledForward:
    """The forward pass of one layer. Its first argument is the layer's input."""

    def __init__(self, forward: Callable[..., Any], kind: _Kind) -> None:
        update_wrapper(self, forward)
        self._plain, self._kind = forward, kind
        # In torch's deterministic mode, kernels must not be chosen by their speed.
        options = {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else None
        how: dict[str, Any] = {"options": options} if BACKEND == "inductor" else {}
        self._compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend=BACKEND, **how)

    def __call__(self, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self._kind.tried:
            self._try(states, *args, **kwargs)
        if not self._kind.refused:
            try:
                return self._run(states, *args, **kwargs)
            except (TorchDynamoException, FailOnRecompileLimitHit) as failure:  # such as too many graphs
                self._kind.refuse(failure.__cause__ or failure)
        return self._plain(states, *args, **kwargs)

    def _run(self, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the graph of training, also in passes without gradients. A second graph for those passes would take
        longer to compile than it saves, and its last bits could differ from those of training."""
        with_gradients = torch.is_grad_enabled()
        with torch.enable_grad():
            outputs = self._compiled(_with_gradient(states), *args, **kwargs)
        if with_gradients:
            return outputs
        return _detached(outputs) if isinstance(outputs, Tensor) else tuple(map(_detached, outputs))

    def _try(self, *inputs: Any, **kwargs: Any) -> None:
        """Compares the compiled layer with the layer itself on these inputs."""
        try:
            plain, found = (_outcome(forward, *inputs, **kwargs) for forward in (self._plain, self._compiled))
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:  # of any type, since it may come from any part of the compiler
            self._kind.refuse(failure)
            return
        self._kind.tried = True
        exact = plain[0].dtype == torch.float32 and autocast_dtype(plain[0].device.type) is None
        off = max(_error(one, other) for one, other in zip(found, plain, strict=True))
        if not off < (_EXACT if exact else _COARSE):  # also refuses NaN
            self._kind.refuse(f"their compiled results have a relative error of {off:.2g}")


def _outcome(forward: Callable[..., Any], states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """A layer's output and a gradient of its input. Parameters get no gradients."""
    leaf = states.detach().requires_grad_()
    # These hooks do nothing. Without them, gradient checkpointing's hooks would call the layer again in the backward
    # pass.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        outputs = forward(leaf, *args, **kwargs)
        output = outputs if isinstance(outputs, Tensor) else outputs[0]
        (gradient,) = torch.autograd.grad(output, leaf, output.detach())
    return output.detach(), gradient


def _with_gradient(states: Tensor) -> Tensor:
    """Makes the input need a gradient. With frozen embeddings, the first layer's input needs none, but a second graph
    for that case would cost more."""
    return states if states.requires_grad else states.detach().requires_grad_()


def _detached(output: Any) -> Any:
    return output.detach() if isinstance(output, Tensor) else output


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))
