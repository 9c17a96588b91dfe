"""Packing and unpacking weights: bit for bit, in bounded buckets, and never a corrupt one."""

import pickle
import warnings

import numpy as np
import pytest
import torch

from common.weights import CorruptWeightsError, WeightSet, pack


def bits(tensor):
    return tensor.contiguous().view(torch.int16).flatten().tolist()


def some_tensors():
    torch.manual_seed(0)
    shapes = {"embed": (10, 4), "scalar": (), "norm": (4,), "cube": (2, 3, 5), "one": (1, 1), "head": (7, 4)}
    return [(name, torch.randn(shape, dtype=torch.bfloat16)) for name, shape in shapes.items()]


def read_only(weights):
    """As Ray hands it over: arrays whose memory may not be written to."""
    buffers = []
    data = pickle.dumps(weights, protocol=5, buffer_callback=buffers.append)
    copy = pickle.loads(data, buffers=[bytes(buffer.raw()) for buffer in buffers])
    assert not any(bucket.flags.writeable for bucket in copy.buckets)
    return copy


def test_every_bf16_bit_pattern_survives_the_round_trip():
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)  # infinities, every NaN and both zeros among them
    weights = pack([("all", patterns.view(torch.bfloat16).reshape(256, 256))], 3)
    weights.verify()
    ((name, tensor),) = weights.tensors()
    assert (name, tensor.shape, tensor.dtype, weights.version) == ("all", (256, 256), torch.bfloat16, 3)
    assert bits(tensor) == patterns.tolist()


@pytest.mark.parametrize("bucket_bytes", [1, 7, 80, 81, 10_000])
def test_names_shapes_order_and_bits_come_back_and_buckets_stay_within_bounds(bucket_bytes):
    named = some_tensors()
    weights = pack(named, 1, bucket_bytes=bucket_bytes)
    weights.verify()
    found = list(weights.tensors())
    assert [(n, t.shape, bits(t)) for n, t in found] == [(n, t.shape, bits(t)) for n, t in named]
    for number, bucket in enumerate(weights.buckets):
        inside = [entry for entry in weights.entries if entry.bucket == number]
        assert bucket.nbytes <= bucket_bytes or len(inside) == 1
    if bucket_bytes == 10_000:
        assert len(weights.buckets) == 1


def test_buckets_are_filled_in_order():
    # Bytes: embed 80, scalar 2, norm 8, cube 60, one 2, head 56; an eighty-byte bucket takes 80 | 2 + 8 + 60 + 2 | 56.
    weights = pack(some_tensors(), 1, bucket_bytes=80)
    assert [bucket.nbytes for bucket in weights.buckets] == [80, 72, 56]
    assert [(e.bucket, e.offset) for e in weights.entries] == [(0, 0), (1, 0), (1, 1), (1, 5), (1, 35), (2, 0)]


def test_float32_parameters_are_rounded_to_the_nearest_bf16():
    # bf16 steps by 2^-7 above 1. Half a step is a tie and goes to the even neighbour: 1 + 2^-8 down, 1 + 3 * 2^-8 up.
    parameter = torch.nn.Parameter(torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -0.1]))
    ((_, tensor),) = pack([("p", parameter)], 0).tensors()
    assert tensor.tolist() == [1.0, 1 + 2**-6, 1 + 2**-7, -0.10009765625]
    assert not tensor.requires_grad


def test_strided_tensors_are_packed_in_the_order_they_are_read():
    tensor = torch.arange(6.0).reshape(2, 3)
    found = dict(pack([("t", tensor.T), ("skip", tensor[:, ::2])], 0).tensors())
    assert found["t"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert found["skip"].tolist() == [[0.0, 2.0], [3.0, 5.0]]


def test_a_weight_set_does_not_follow_later_updates_of_the_parameters():
    tensor = torch.ones(3, dtype=torch.bfloat16)
    weights = pack([("t", tensor)], 0)
    tensor.zero_()
    assert next(weights.tensors())[1].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("bucket", "value", "bit"), [(0, 0, 0), (0, 39, 15), (1, 17, 7), (2, 27, 8)])
def test_one_flipped_bit_is_refused(bucket, value, bit):
    weights = pack(some_tensors(), 12, bucket_bytes=80)
    damaged = [array.copy() for array in weights.buckets]
    damaged[bucket].view(np.uint16)[value] ^= 1 << bit
    weights.verify()
    with pytest.raises(CorruptWeightsError, match=rf"version 12: bucket {bucket} "):
        WeightSet(12, weights.entries, tuple(damaged), weights.checksums).verify()


def test_swapped_buckets_are_refused():
    weights = pack([("a", torch.ones(4)), ("b", torch.zeros(4))], 0, bucket_bytes=8)
    with pytest.raises(CorruptWeightsError):
        WeightSet(0, weights.entries, weights.buckets[::-1], weights.checksums).verify()


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_read_only_buckets_are_read_in_place():
    weights = read_only(pack(some_tensors(), 1, bucket_bytes=80))
    weights.verify()
    found = list(weights.tensors())
    assert [(n, bits(t)) for n, t in found] == [(n, bits(t)) for n, t in some_tensors()]
    for entry, (_, tensor) in zip(weights.entries, found, strict=True):
        assert tensor.data_ptr() == weights.buckets[entry.bucket].ctypes.data + 2 * entry.offset


def test_reading_read_only_buckets_gives_no_warning():
    weights = read_only(pack(some_tensors(), 1))
    torch.set_warn_always(True)  # else PyTorch says it once per process, perhaps in an earlier test
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            list(weights.tensors())
    finally:
        torch.set_warn_always(False)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_tensor_without_values_may_stand_anywhere(place):
    named = [("a", torch.ones(2)), ("b", torch.ones(3))]
    named.insert(place, ("empty", torch.empty(0, 5)))
    weights = pack(named, 0, bucket_bytes=4)
    weights.verify()
    assert [(n, tuple(t.shape)) for n, t in weights.tensors()] == [(n, tuple(t.shape)) for n, t in named]
