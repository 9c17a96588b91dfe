"""New weights for a vLLM engine, prepared beside the old ones while it steps, and exchanged between two steps.

On CPU that is a packed copy of every layer's weights and then an exchange of pointers; other models and devices, and
engines over several, go through vLLM's own reload. vLLM is read from the inside here: what is not known is refused,
never guessed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vllm._custom_ops as ops
from safetensors import safe_open
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

from actors.engine import EngineDeadError
from common.models import parameter_shapes
from common.weights import Bucket, CorruptWeightsError, Entry


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
        """Raises NotStageableError unless every weight is of a known kind, and the tensors of the model's `directory`
        are just what they are made of."""
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
        """Goes through an update with the names and shapes of the model's files."""
        for file in directory.glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    shape = tensors.get_slice(name).get_shape()
                    try:
                        self._add_part(name, torch.empty(shape, device="meta"))
                    except CorruptWeightsError as error:
                        raise NotStageableError(str(error)) from error
        if missing := [name for name in self._slots if self._whole(name) is None]:
            raise NotStageableError(f"the model's files do not hold {missing[:5]}")

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


class Inventory:
    """What a full set of weights holds. vLLM's reload by itself cuts what it needs out of a tensor that is too large,
    and does not miss one part of a merged layer."""

    def __init__(self, directory: Path) -> None:
        self.shapes = parameter_shapes(directory)

    def check(self, bucket: Bucket) -> None:
        """Raises CorruptWeightsError for a tensor that the model in the directory has no place for."""
        for name, shape in ((entry.name, entry.shape) for entry in bucket.entries):
            if self.shapes.get(name) != shape:
                wanted = f"it as {self.shapes[name]}" if name in self.shapes else "no such weight"
                raise CorruptWeightsError(f"{name} has the shape {shape}, but the engine has {wanted}")

    def check_whole(self, names: Iterable[str], version: int) -> None:
        """Raises CorruptWeightsError unless these are all."""
        if missing := sorted(self.shapes.keys() - set(names)):
            raise CorruptWeightsError(f"weights version {version} leaves out {missing[:5]}")


class ReloadedWeights:
    """Weight updates of any model through vLLM's own reload: staged on the model's device as they came, and worked in
    between two steps, while every request waits."""

    def __init__(self, model_runner: Any, directory: Path) -> None:
        self._runner = model_runner
        self._inventory = Inventory(directory)
        self._tensors: dict[str, Tensor] = {}

    def stage(self, bucket: Bucket) -> None:
        """On any thread. Raises CorruptWeightsError for a tensor that the model has no place for."""
        if bucket.index == 0:
            self._tensors = {}
        self._inventory.check(bucket)
        for name, tensor in bucket.tensors():
            self._tensors[name] = tensor.to(self._runner.device)

    def swap(self, version: int) -> list[Any]:
        """On the engine's thread. Returns what is to be freed. Raises CorruptWeightsError, with the old set in place,
        if a parameter has no new value; EngineDeadError if it fails half way."""
        self._inventory.check_whole(self._tensors, version)
        try:
            _reload(self._runner, self._tensors)
        except Exception as error:
            raise EngineDeadError(f"loading weights version {version} failed half way: {error}") from error
        old = [self._tensors]
        self._tensors = {}
        return old


def _reload(model_runner: Any, tensors: dict[str, Tensor]) -> None:
    """Raises an error also if a parameter kept its old value: vLLM by itself would only log that."""
    model = model_runner.get_model()
    wanted, loaded = {name for name, _ in model.named_parameters()}, set()
    load_weights = model.load_weights

    def load_and_note(tensors: Any) -> Any:
        loaded.update(load_weights(tensors))
        return loaded

    model.load_weights = load_and_note
    try:
        model_runner.reload_weights(weights_iterator=iter(tensors.items()))
    finally:
        del model.load_weights
    if missing := wanted - loaded:
        raise RuntimeError(f"{sorted(missing)[:5]} left out: the engine is mixed")
    if getattr(model.config, "tie_word_embeddings", False) and hasattr(model, "lm_head"):
        # vLLM 0.32 on CPU: the tied head keeps a packed copy of the old embedding (0.19 nats off, silently).
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


class ShardedWeights:
    """Weight updates of an engine over several devices, each of which has a process with a shard of every layer: staged
    in memory that all of them see; between two steps each loads its shard from there, while every request waits."""

    def __init__(self, collective_rpc: Callable[..., list[Any]], directory: Path) -> None:
        """`collective_rpc` calls a function in every process; the model in `directory` says what a set must hold."""
        self._collective_rpc = collective_rpc
        self._inventory = Inventory(directory)
        self._begin()

    def _begin(self) -> None:
        # A file in memory alone: it goes with the last process that has it open, however that ends.
        self._file = os.fdopen(os.memfd_create("weights"), "wb")
        self._entries: list[Entry] = []

    def stage(self, bucket: Bucket) -> None:
        """On any thread. Raises CorruptWeightsError for a tensor that the model has no place for."""
        if bucket.index == 0:
            self._begin()
        self._inventory.check(bucket)
        begin = self._file.tell() // bucket.values.itemsize
        self._file.write(bucket.values.data)
        self._file.flush()
        self._entries += [replace(entry, offset=begin + entry.offset) for entry in bucket.entries]

    def swap(self, version: int) -> list[Any]:
        """On the engine's thread. Returns what is to be freed. Raises CorruptWeightsError, with the old set in place,
        if a parameter has no new value; EngineDeadError if it fails half way, in any of the processes."""
        self._inventory.check_whole((entry.name for entry in self._entries), version)
        path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        try:
            faults = self._collective_rpc(_reload_shard, args=(path, tuple(self._entries)))
        except Exception as error:  # one of the processes is gone
            raise EngineDeadError(f"loading weights version {version} failed half way: {error}") from error
        if any(faults):
            raise EngineDeadError(f"loading weights version {version} failed half way: {faults}")
        old = [self._file]
        self._begin()
        return old


def _reload_shard(worker: Any, path: str, entries: tuple[Entry, ...]) -> str | None:
    """In a worker's process: loads its shard of the tensors in the file. Returns what went wrong, since an error raised
    here would leave the other workers' answers in vLLM's queues, to be taken for those of the next call."""
    try:
        values = np.memmap(path, np.int16, "r")
        whole = Bucket(0, 0, True, entries, values, 0)
        _reload(worker.model_runner, dict(whole.tensors()))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


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
