"""New weights through vLLM's own reload, for engines whose weights are not known well enough to be exchanged, or are
split over several devices: every request waits while they are worked in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform

from common.errors import CorruptWeightsError, EngineDeadError
from common.model.size import constants, parameter_shapes
from common.weights import Bucket, Entry


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
        self._directory = directory
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
            _reload(self._runner, self._tensors, self._directory)
        except Exception as error:
            raise EngineDeadError(f"loading weights version {version} failed half way: {error}") from error
        old = [self._tensors]
        self._tensors = {}
        return old


def _reload(model_runner: Any, tensors: dict[str, Tensor], directory: Path) -> None:
    """Raises an error also if a parameter kept its old value: vLLM by itself would only log that. What is never trained
    is not published, and some of it is a parameter to vLLM: it comes from the files in the directory again."""
    model = model_runner.get_model()
    wanted, loaded = {name for name, _ in model.named_parameters()}, set()
    load_weights = model.load_weights

    def load_and_note(tensors: Any) -> Any:
        loaded.update(load_weights(tensors))
        return loaded

    if current_platform.is_cpu():
        # vLLM 0.32 packs the weights of experts only when it builds the kernel that multiplies by them: once, so that a
        # reload would leave them unpacked (nats off, silently). Without a kernel it builds one again.
        for method in (getattr(module, "quant_method", None) for module in model.modules()):
            if isinstance(method, UnquantizedFusedMoEMethod):
                method.moe_kernel = None
    model.load_weights = load_and_note
    try:
        with set_current_vllm_config(model_runner.vllm_config):  # some layers ask for it
            model_runner.reload_weights(weights_iterator=chain(tensors.items(), constants(directory).items()))
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
        self._directory = directory
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
            faults = self._collective_rpc(_reload_shard, args=(path, tuple(self._entries), self._directory))
        except Exception as error:  # one of the processes is gone
            raise EngineDeadError(f"loading weights version {version} failed half way: {error}") from error
        if any(faults):
            raise EngineDeadError(f"loading weights version {version} failed half way: {faults}")
        old = [self._file]
        self._begin()
        return old


def _reload_shard(worker: Any, path: str, entries: tuple[Entry, ...], directory: Path) -> str | None:
    """In a worker's process: loads its shard of the tensors in the file. Returns what went wrong, since an error raised
    here would leave the other workers' answers in vLLM's queues, to be taken for those of the next call."""
    try:
        values = np.memmap(path, np.int16, "r")
        whole = Bucket(0, 0, True, entries, values, 0)
        _reload(worker.model_runner, dict(whole.tensors()), directory)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
