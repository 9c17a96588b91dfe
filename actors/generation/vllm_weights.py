"""New weights for a vLLM engine, prepared beside the old ones while it steps, and exchanged between two steps.

On CPU that is a packed copy of every layer's weights and then an exchange of pointers. vLLM is read from the inside
here: what is not known is refused, never guessed, and goes through vLLM's own reload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import vllm._custom_ops as ops
from torch import Tensor, nn
from vllm._custom_ops import CPUDNNLGEMMHandler
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper, _get_tied_embedding_params
from vllm.platforms import current_platform

from actors.generation.vllm_reload import ReloadedWeights, ShardedWeights
from common.errors import CorruptWeightsError
from common.model.size import parameter_shapes
from common.weights import Bucket


class NotStageableError(RuntimeError):
    """New weights of this model cannot be prepared beside the old ones here."""


@dataclass(frozen=True)
class Slot:
    """A weight of the engine's model: the tensors that make it up, and where its values go."""

    parameter: nn.Parameter  # without values where only packed copies of them are used
    parts: dict[int | str | None, tuple[int, ...]]  # shard -> shape; several where vLLM merges layers
    rows: int  # of all parts together, and of padding to the vocabulary
    packed_by: list[Any]  # layers that multiply by a packed copy of the values


@dataclass
class Staged:
    """New values of a slot, ready for use."""

    values: Tensor | None
    handler: CPUDNNLGEMMHandler | None


class PackedWeights:
    """Weight updates of an unquantized model on CPU, where oneDNN layers multiply by packed copies of their weights.

    A new set is packed beside the old one on another thread than the engine's; all that is left to do between two
    steps is to exchange pointers. vLLM's own reload would pack while every request waits.
    """

    def __init__(self, model_runner: Any, directory: Path) -> None:
        """Raises NotStageableError unless every weight is of a known kind, and what a learner publishes of the model in
        `directory` is just what they are made of."""
        model = model_runner.get_model()
        if model_runner.model_config.use_mla:
            raise NotStageableError("attention keeps weights derived from its layers'")
        mapper = getattr(model, "hf_to_vllm_mapper", None) or WeightsMapper()
        self._find_shard: Callable[[str], Any] = mapper._map_name_with_shard
        self._aliases = set(_get_tied_embedding_params(model))
        self._slots: dict[str, Slot] = {}
        by_parameter: dict[int, Slot] = {}
        for prefix, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                slot = by_parameter.setdefault(id(parameter), _slot(module, name, parameter))
                self._slots.setdefault(f"{prefix}.{name}", slot)
                if name == "weight" and _is_packed(module):
                    slot.packed_by.append(module)
        self._slots = {name: slot for name, slot in self._slots.items() if name not in self._aliases}
        self._begin()
        self._rehearse(directory)
        self._begin()

    def _begin(self) -> None:
        self._parts: dict[str, dict[Any, Tensor]] = {name: {} for name in self._slots}
        self._staged: dict[str, Staged] = {}

    def _rehearse(self, directory: Path) -> None:
        """Goes through an update with the names and shapes that a learner publishes."""
        for name, shape in parameter_shapes(directory).items():
            try:
                self._add_part(name, torch.empty(shape, device="meta"))
            except CorruptWeightsError as error:
                raise NotStageableError(str(error)) from error
        if missing := [name for name in self._slots if self._whole(name) is None]:
            raise NotStageableError(f"a learner does not publish {missing[:5]}")

    @torch.no_grad()
    def stage(self, bucket: Bucket) -> None:
        """On any thread but the engine's. Raises CorruptWeightsError for a tensor that the model has no place for."""
        if bucket.index == 0:
            self._begin()
        for name, tensor in bucket.tensors():
            slot_name = self._add_part(name, tensor)
            if slot_name is not None and (whole := self._whole(slot_name)) is not None:
                self._parts[slot_name] = {}
                self._staged[slot_name] = _prepare(self._slots[slot_name], whole)

    def swap(self, version: int) -> list[Any]:
        """On the engine's thread. Returns the old set, which takes longer to free than a step should wait. Raises
        CorruptWeightsError, with the old set in place, if a parameter has no new value."""
        if missing := [name for name in self._slots if name not in self._staged]:
            raise CorruptWeightsError(f"weights version {version} leaves out all or part of {missing[:5]}")
        old: list[Any] = []
        for name, staged in self._staged.items():
            slot = self._slots[name]
            if staged.values is not None:
                old.append(slot.parameter.data)
                slot.parameter.data = staged.values
            for layer in slot.packed_by:
                old.append(layer.cpu_linear)
                layer.cpu_linear = partial(_multiply, staged.handler)
        self._begin()
        return old

    def _add_part(self, name: str, tensor: Tensor) -> str | None:
        """Keeps a part; returns the name of its slot, or None if the engine has no use for it."""
        if (found := self._find_shard(name)) is None:
            return None
        slot_name, shard = found
        if slot_name in self._aliases:  # a tied head, sent beside the embedding
            return None
        slot = self._slots.get(slot_name)
        if slot is None or slot.parts.get(shard) != tuple(tensor.shape):
            wanted = "no such weight" if slot is None else f"it as {slot.parts}"
            raise CorruptWeightsError(f"{name} has the shape {tuple(tensor.shape)}, but the engine has {wanted}")
        self._parts[slot_name][shard] = tensor
        return slot_name

    def _whole(self, slot_name: str) -> list[Tensor] | None:
        """The parts of a slot in their order, if they are all there."""
        parts = self._parts[slot_name]
        wanted = self._slots[slot_name].parts
        return [parts[shard] for shard in wanted] if len(parts) == len(wanted) else None


def _slot(module: nn.Module, name: str, parameter: nn.Parameter) -> Slot:
    """Raises NotStageableError for a kind of layer whose weights may be kept in a way not known here."""
    if isinstance(module, LinearBase) and type(module.quant_method) is UnquantizedLinearMethod:
        columns = (module.input_size,) if name == "weight" else ()
        if isinstance(module, QKVParallelLinear):
            shards: Iterable[int | str | None] = ("q", "k", "v")
        elif isinstance(module, MergedColumnParallelLinear):
            shards = range(len(module.output_sizes))
        else:
            return Slot(parameter, {None: (module.output_size, *columns)}, module.output_size, [])
        parts = {shard: (rows, *columns) for shard, rows in zip(shards, module.output_sizes, strict=True)}
        return Slot(parameter, parts, sum(module.output_sizes), [])
    if isinstance(module, VocabParallelEmbedding) and type(module.quant_method) is UnquantizedEmbeddingMethod:
        part = (module.org_vocab_size, *parameter.shape[1:])
        return Slot(parameter, {None: part}, parameter.shape[0], [])
    if isinstance(module, (RMSNorm, nn.LayerNorm)):
        return Slot(parameter, {None: tuple(parameter.shape)}, parameter.shape[0], [])
    raise NotStageableError(f"{type(module).__name__}.{name} is of no known kind")


def _is_packed(layer: nn.Module) -> bool:
    """Whether the layer multiplies by oneDNN's packed copy of its weight. Raises NotStageableError if by another's."""
    function = getattr(layer, "cpu_linear", None)
    kept = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    if any(isinstance(value, CPUDNNLGEMMHandler) for value in kept):
        return True
    if kept or (isinstance(layer, LinearBase) and function is None):
        raise NotStageableError(f"{type(layer).__name__} multiplies in a way not known here")
    return False  # by the parameter itself


def _prepare(slot: Slot, parts: list[Tensor]) -> Staged:
    """New values in memory of their own, of the engine's precision."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    if whole.shape[0] < slot.rows:
        whole = torch.cat([whole, whole.new_zeros(slot.rows - whole.shape[0], *whole.shape[1:])])
    values = whole.to(slot.parameter.dtype)
    handler = ops.create_onednn_mm(values.t(), 32) if slot.packed_by else None
    if slot.parameter.numel() == 0:
        return Staged(None, handler)
    return Staged(values.clone() if values is parts[0] else values, handler)  # the bucket's memory is not the engine's


def _multiply(handler: CPUDNNLGEMMHandler, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What vLLM calls as `cpu_linear`; the packed copy stands for the weight."""
    return ops.onednn_mm(handler, x, bias)


def weights_of(engine: Any, directory: Path) -> PackedWeights | ReloadedWeights | ShardedWeights:
    """The quickest way of updating the weights of this vLLM engine."""
    if engine.vllm_config.parallel_config.tensor_parallel_size > 1:
        return ShardedWeights(engine.collective_rpc, directory)
    [model_runner] = engine.collective_rpc(lambda worker: worker.model_runner)
    if current_platform.is_cpu():
        try:
            return PackedWeights(model_runner, directory)
        except NotStageableError as reason:
            print(f"weight updates go through vLLM's reload, while requests wait: {reason}", flush=True)
    return ReloadedWeights(model_runner, directory)
