"""torch.compile without its compiler, for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from common.model import compiled_layers

# vLLM's engine sets it in its process. Then torch.compile does nothing.
DISABLED = "TORCHDYNAMO_DISABLE"


def trace_only(patch: pytest.MonkeyPatch, backend: str | Callable[..., Any] = "eager") -> None:
    """From here on compiled layers are traced, and their operations run one by one: "eager" traces the forward pass,
    "aot_eager" both passes. Forgets all earlier graphs."""
    patch.setattr(compiled_layers, "BACKEND", backend)
    patch.delenv(DISABLED, raising=False)
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    """Graphs that were made since then."""
    return counters["stats"]["unique_graphs"]
