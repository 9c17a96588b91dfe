"""The device of a role: the CPU without GPUs, and a refusal of GPUs that are missing or too old."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from common.model.files import find_device


@pytest.fixture
def gpu(monkeypatch):
    """Makes torch find a GPU of this compute capability, or none."""

    def found(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")

    return found


@pytest.mark.parametrize("capability", [None, (7, 5), (9, 0)])
def test_a_role_without_gpus_runs_on_the_cpu(gpu, capability):
    gpu(capability)
    assert find_device(0) == torch.device("cpu")


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_a_share_of_a_gpu_is_enforced(gpu, monkeypatch, capability):
    gpu(capability)
    limits = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=6000 << 20))
    assert find_device(0.3) == find_device(1) == torch.device("cuda")
    assert limits == [pytest.approx(0.2)]  # CUDA's context takes 600 of 6,000 MiB, and the limit does not count it


def test_a_missing_gpu_is_refused(gpu):
    gpu(None)
    with pytest.raises(RuntimeError, match=r"this process reserves 0.3 GPUs, but torch finds none; set gpus = 0"):
        find_device(0.3)


def test_a_gpu_that_is_too_old_is_refused_by_its_name(gpu):
    gpu((7, 5))
    with pytest.raises(RuntimeError, match=r"Tesla T4 has compute capability 7.5, and 8.0 \(Ampere\) is the least"):
        find_device(1)
