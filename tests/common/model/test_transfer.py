"""Copies between host and GPU, on tensors without values that claim to be on a GPU."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from common.model.transfer import cast_on_gpu, on_device

CPU = torch.device("cpu")


def test_a_tensor_leaves_a_gpu_in_bf16():
    with FakeTensorMode():
        sent = cast_on_gpu(torch.empty(4, 3, device="cuda"))
    assert (sent.dtype, sent.device.type, sent.shape) == (torch.bfloat16, "cuda", (4, 3))


def test_a_copy_within_the_host_casts_on_its_way():
    tensor = torch.zeros(4, 3)
    assert cast_on_gpu(tensor) is tensor
    assert on_device(tensor, CPU) is tensor


def test_a_copy_to_a_gpu_goes_through_page_locked_memory(monkeypatch):
    pinned, copied = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, **how: copied.append((device, how)) or self)
    tensor, gpu = torch.zeros(3), torch.device("cuda")
    assert on_device(tensor, gpu) is tensor
    assert pinned[0] is tensor
    assert copied == [(gpu, {"non_blocking": True})]
