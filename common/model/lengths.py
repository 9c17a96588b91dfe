"""The lengths of the sequences in a packed row, in the forms that attention needs. Runs anywhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from common.model.transfer import on_device

CPU = torch.device("cpu")


class Lengths:
    """The lengths of the sequences in a packed row. Layers pass this object on to their attention unchanged.

    It is an object, not a list: torch.compile would make one graph for each list of numbers. It reads only those
    attributes of an object that the layer uses, and `longest` may change without a new graph.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device = CPU) -> None:
        self.each = tuple(lengths)
        self.longest = max(lengths)
        self.ends_on_host = torch.tensor([0, *lengths]).cumsum(0)  # int64 [B + 1]: 0, and the end of each sequence
        self.ends = on_device(self.ends_on_host.to(torch.int32), device)
