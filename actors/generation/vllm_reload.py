"""Loads new weights through vLLM's own reload. Every request waits meanwhile. Runs in each generator.

For engines over several devices, and for engines on one device with layers that `vllm_weights` does not know.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform

from common.errors import CorruptWeightsError, EngineDeadError
from common.model.size import constants, parameter_shapes
from common.weights import Bucket, Entry


class Inventory:
    """Names and shapes of a complete set of weights, and the names of the current set that have arrived.

    vLLM's reload does not check them: it slices an oversized tensor, and does not notice that a part of a merged layer
    is missing.
    """

    def __init__(self, directory: Path) -> None:
        """Expects the set that a learner publishes for the model in `directory`."""
        self.shapes = parameter_shapes(directory)
        self._names: set[str] = set()

    def add(self, bucket: Bucket) -> None:
        """Records the tensors of a bucket; bucket 0 starts a new set. Raises CorruptWeightsError for a tensor
        whose name or shape the model does not have."""
        if bucket.index == 0:
            self._names = set()
        for entry in bucket.entries:
            name, shape = entry.name, entry.shape
            if self.shapes.get(name) != shape:
                expected = f"it with shape {self.shapes[name]}" if name in self.shapes else "no such weight"
                raise CorruptWeightsError(f"{name} has the shape {shape}, but the engine has {expected}")
            self._names.add(name)

    def finish(self, version: int) -> None:
        """Ends the current set. Raises CorruptWeightsError unless all tensors have arrived."""
        if missing := sorted(self.shapes.keys() - self._names):
            raise CorruptWeightsError(f"weights version {version} leaves out {missing[:5]}")
        self._names = set()


def finish_copies() -> None:
    """Returns when the copies that were queued on this process's GPU are done: the pause of the engine ends then."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class ReloadedWeights:
    """Weight updates of any model on one device. Tensors are staged in the machine's memory. Between two steps vLLM
    reloads them, while every request waits."""

    def __init__(self, model_runner: Any, directory: Path) -> None:
        self._runner = model_runner
        self._directory = directory
        self._inventory = Inventory(directory)
        self._tensors: dict[str, Tensor] = {}

    def stage(self, bucket: Bucket) -> None:
        """Runs on any thread. Raises CorruptWeightsError for a tensor whose name or shape the model does not have."""
        if bucket.index == 0:
            self._tensors = {}
        self._inventory.add(bucket)
        for name, tensor in bucket.tensors():
            # A pinned copy: the GPU never holds two sets, and reads this one at full speed.
            self._tensors[name] = tensor.pin_memory() if torch.cuda.is_available() else tensor

    def swap(self, version: int) -> list[Any]:
        """Runs on the engine's thread. Returns objects that the caller should free. Raises CorruptWeightsError, with
        the old set in place, if a parameter has no new value; EngineDeadError if the reload fails half way."""
        self._inventory.finish(version)
        try:
            _reload(self._runner, self._tensors, self._directory)
        except Exception as error:
            raise EngineDeadError(f"loading weights version {version} failed half way: {error}") from error
        old = [self._tensors]
        self._tensors = {}
        return old


def _reload(model_runner: Any, tensors: dict[str, Tensor], directory: Path) -> None:
    """Loads `tensors` into the model. Raises an error if a parameter kept its old value, which vLLM would only log.

    vLLM also expects constants that are never trained, and so never published: they are read from `directory` again.
    """
    model = model_runner.get_model()
    expected, loaded = {name for name, _ in model.named_parameters()}, set()
    load_weights = model.load_weights

    def load_and_note(tensors: Any) -> Any:
        loaded.update(load_weights(tensors))
        return loaded

    if current_platform.is_cpu():
        # vLLM 0.32 packs the weights of experts only when it builds the kernel that multiplies by them, and it builds
        # that once. So drop the kernel: with unpacked weights, log-probabilities would be nats off after a reload.
        for method in (getattr(module, "quant_method", None) for module in model.modules()):
            if isinstance(method, UnquantizedFusedMoEMethod):
                method.moe_kernel = None
    model.load_weights = load_and_note
    try:
        with set_current_vllm_config(model_runner.vllm_config):  # some layers need it
            model_runner.reload_weights(weights_iterator=chain(tensors.items(), constants(directory).items()))
    finally:
        del model.load_weights
    finish_copies()
    if missing := expected - loaded:
        raise RuntimeError(f"{sorted(missing)[:5]} kept old values, so the engine holds a mixture")
    if getattr(model.config, "tie_word_embeddings", False) and hasattr(model, "lm_head"):
        # vLLM 0.32 on CPU: a tied head keeps a packed copy of the old embedding (0.19 nats off), so it is packed again.
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


class ShardedWeights:
    """Weight updates of an engine over several devices. Each has a process with a shard of every layer.

    Buckets are staged in memory that all processes share. Between two steps each process loads its shards from there,
    while every request waits.
    """

    def __init__(self, collective_rpc: Callable[..., list[Any]], directory: Path) -> None:
        """`collective_rpc` calls a function in every process."""
        self._collective_rpc = collective_rpc
        self._directory = directory
        self._inventory = Inventory(directory)
        self._start()

    def _start(self) -> None:
        # A file in memory only. The kernel frees it once no process has it open, even if processes are killed.
        self._file = os.fdopen(os.memfd_create("weights"), "wb")
        self._entries: list[Entry] = []

    def stage(self, bucket: Bucket) -> None:
        """Runs on any thread. Raises CorruptWeightsError for a tensor whose name or shape the model does not have."""
        if bucket.index == 0:
            self._start()
        self._inventory.add(bucket)
        offset = self._file.tell() // bucket.values.itemsize
        self._file.write(bucket.values.data)
        self._file.flush()
        self._entries += [replace(entry, offset=offset + entry.offset) for entry in bucket.entries]

    def swap(self, version: int) -> list[Any]:
        """Runs on the engine's thread. Returns objects that the caller should free. Raises CorruptWeightsError, with
        the old set in place, if a parameter has no new value; EngineDeadError if the reload fails half way in any
        process."""
        self._inventory.finish(version)
        path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        try:
            faults = self._collective_rpc(_reload_shard, args=(path, tuple(self._entries), self._directory))
        except Exception as error:  # one of the processes is gone
            raise EngineDeadError(f"loading weights version {version} failed half way: {error}") from error
        if any(faults):
            raise EngineDeadError(f"loading weights version {version} failed half way: {faults}")
        old = [self._file]
        self._start()
        return old


def _reload_shard(worker: Any, path: str, entries: tuple[Entry, ...], directory: Path) -> str | None:
    """Runs in a worker process: loads its shards of the tensors in the file. Returns an error as text. If it raised the
    error, the answers of the other workers would stay in vLLM's queues, and the next call would take them for its own.
    """
    try:
        values = np.memmap(path, np.int16, "r")
        whole = Bucket(0, 0, True, entries, values, 0)
        _reload(worker.model_runner, dict(whole.tensors()), directory)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
