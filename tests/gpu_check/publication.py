"""Seconds to publish weights from the device, and the rates of the copies that it consists of."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import LlamaConfig

from common.model.size import without_weights
from common.weights import buckets
from tests.gpu_check.models import SHAPES
from tests.gpu_check.run import Run

VALUES = 1 << 26  # 64 Mi


def check(run: Run) -> None:
    if not run.on_gpu:
        run.skip("publication", "needs a GPU")
        return
    run.part("publication, copies", measure_copies)
    for name in ("135M", "7B") if run.big else ("135M",):
        run.part(f"publication of {name}", measure_publication, name)


def measure_copies(run: Run) -> None:
    source = torch.randn(VALUES, device=run.device)
    pageable, pinned = (torch.empty(VALUES, dtype=torch.bfloat16, pin_memory=pin) for pin in (False, True))
    back = torch.empty(VALUES, device=run.device, dtype=torch.bfloat16)
    ways = {
        "float32 cast on the host, pageable": lambda: pageable.copy_(source),
        "cast on the GPU, pageable": lambda: pageable.copy_(source.bfloat16()),
        "cast on the GPU, pinned": lambda: pinned.copy_(source.bfloat16()),
        "pinned to pageable on the host": lambda: pageable.copy_(pinned),
        "to the GPU from pageable": lambda: back.copy_(pageable),
        "to the GPU from pinned": lambda: back.copy_(pinned),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a learner
    for name, copy in ways.items():
        took = run.milliseconds(copy, rounds=5, warm_up=1)
        run.figure(f"publication, {VALUES >> 20} Mi values, {name}: {took:.0f} ms, {2 * VALUES / took / 1e6:.1f} GB/s")
    torch.set_num_threads(threads)


def measure_publication(run: Run, name: str) -> None:
    """Packs every weight in float32 from the device into buckets, as a learner does, and drops each bucket."""
    model = without_weights(LlamaConfig(**SHAPES[name]))
    shapes = {key: parameter.shape for key, parameter in model.named_parameters()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for key, shape in shapes.items():
            yield key, torch.ones(shape, device=run.device)

    def pack() -> int:
        return sum(bucket.values.nbytes for bucket in buckets(tensors(), 0))

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a learner
    took, packed = run.seconds(pack)
    torch.set_num_threads(threads)
    run.figure(
        f"publication of {name}: {packed / 1e9:.2f} GB in {len(shapes)} tensors are packed in {took:.2f} s, "
        f"{packed / took / 1e9:.1f} GB/s"
    )
