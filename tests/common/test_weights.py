"""Packing and receiving weights: exact bits, buckets of bounded size packed one by one, corrupt sets refused."""

import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.errors import CorruptWeightsError
from common.weights import Bucket, Delta, IncomingWeights, Manifest, buckets, make_delta, publication


def bits(tensor):
    return tensor.contiguous().view(torch.int16).flatten().tolist()


def some_tensors():
    torch.manual_seed(0)
    shapes = {"embed": (10, 4), "scalar": (), "norm": (4,), "cube": (2, 3, 5), "one": (1, 1), "head": (7, 4)}
    return [(name, torch.randn(shape, dtype=torch.bfloat16)) for name, shape in shapes.items()]


def three_buckets(version=12):
    # Bytes: embed 80, scalar 2, norm 8, cube 60, one 2, head 56; buckets of 80 bytes hold 80 | 2 + 8 + 60 + 2 | 56.
    return list(buckets(some_tensors(), version, bucket_bytes=80))


def unpack(packed):
    return [pair for bucket in packed for pair in bucket.tensors()]


def receive(packed, version):
    incoming = IncomingWeights()
    for bucket in packed:
        incoming.add(bucket)
    incoming.check_complete(version)


def read_only(bucket):
    """The bucket as Ray delivers it: its array is read-only."""
    buffers = []
    data = pickle.dumps(bucket, protocol=5, buffer_callback=buffers.append)
    copy = pickle.loads(data, buffers=[bytes(buffer.raw()) for buffer in buffers])
    assert not copy.values.flags.writeable
    return copy


def test_every_bf16_bit_pattern_survives_the_round_trip():
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)  # with infinities, every NaN and both zeros
    packed = list(buckets([("all", patterns.view(torch.bfloat16).reshape(256, 256))], 3))
    receive(packed, 3)
    ((name, tensor),) = unpack(packed)
    assert (name, tensor.shape, tensor.dtype) == ("all", (256, 256), torch.bfloat16)
    assert bits(tensor) == patterns.tolist()


@pytest.mark.parametrize("bucket_bytes", [1, 7, 80, 81, 10_000])
def test_names_shapes_order_and_bits_survive_in_bounded_buckets(bucket_bytes):
    named = some_tensors()
    packed = list(buckets(named, 1, bucket_bytes=bucket_bytes))
    receive(packed, 1)
    assert [(n, t.shape, bits(t)) for n, t in unpack(packed)] == [(n, t.shape, bits(t)) for n, t in named]
    assert all(bucket.values.nbytes <= bucket_bytes or len(bucket.entries) == 1 for bucket in packed)
    if bucket_bytes == 10_000:
        assert len(packed) == 1


def test_buckets_are_filled_in_order_and_the_last_is_marked():
    packed = three_buckets()
    assert [bucket.values.nbytes for bucket in packed] == [80, 72, 56]
    assert [[entry.offset for entry in bucket.entries] for bucket in packed] == [[0], [0, 1, 5, 35], [0]]
    assert [(bucket.version, bucket.index, bucket.last) for bucket in packed] == [
        (12, 0, False), (12, 1, False), (12, 2, True),
    ]  # fmt: skip


def test_a_tensor_is_requested_once_those_before_it_are_packed():
    asked = []

    def named_tensors():
        for name, tensor in some_tensors():
            asked.append(name)
            yield name, tensor

    stream = buckets(named_tensors(), 1, bucket_bytes=80)
    assert asked == []
    seen = [(len(bucket.entries), list(asked)) for bucket in stream]
    # One tensor more than is packed was requested: the one that did not fit.
    assert seen[0] == (1, ["embed", "scalar"])
    assert seen[1] == (4, ["embed", "scalar", "norm", "cube", "one", "head"])
    assert seen[2] == (1, ["embed", "scalar", "norm", "cube", "one", "head"])


def test_float32_parameters_are_rounded_to_the_nearest_bf16():
    # bf16 steps by 2^-7 above 1. Half a step is a tie and goes to the even neighbour: 1 + 2^-8 down, 1 + 3 * 2^-8 up.
    parameter = torch.nn.Parameter(torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -0.1]))
    ((_, tensor),) = unpack(buckets([("p", parameter)], 0))
    assert tensor.tolist() == [1.0, 1 + 2**-6, 1 + 2**-7, -0.10009765625]
    assert not tensor.requires_grad


def test_strided_tensors_are_packed_in_the_order_they_are_read():
    tensor = torch.arange(6.0).reshape(2, 3)
    found = dict(unpack(buckets([("t", tensor.T), ("skip", tensor[:, ::2])], 0)))
    assert found["t"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert found["skip"].tolist() == [[0.0, 2.0], [3.0, 5.0]]


def test_later_changes_of_a_parameter_do_not_change_its_bucket():
    tensor = torch.ones(3, dtype=torch.bfloat16)
    packed = list(buckets([("t", tensor), ("u", tensor + 1)], 0, bucket_bytes=6))
    tensor.zero_()
    assert [t.tolist() for _, t in unpack(packed)] == [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]


@pytest.mark.parametrize(("index", "value", "bit"), [(0, 0, 0), (0, 39, 15), (1, 17, 7), (2, 27, 8)])
def test_one_flipped_bit_is_refused(index, value, bit):
    packed = three_buckets()
    receive(packed, 12)
    damaged = packed[index].values.copy()
    damaged.view(np.uint16)[value] ^= 1 << bit
    packed[index] = replace(packed[index], values=damaged)
    with pytest.raises(CorruptWeightsError, match=rf"version 12: bucket {index} has checksum"):
        receive(packed, 12)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 13},
        {"index": 0},
        {"last": True},
        {"entries": (replace(three_buckets()[1].entries[0], name="other"), *three_buckets()[1].entries[1:])},
        {"entries": three_buckets()[1].entries[:-1]},
    ],
    ids=str,
)
def test_the_header_of_a_bucket_is_part_of_its_checksum(change):
    packed = three_buckets()
    with pytest.raises(CorruptWeightsError, match="has checksum"):
        replace(packed[1], **change).verify()


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([], "not complete: 0 buckets"),
        ([0, 1], "without the last one"),
        ([0], "without the last one"),
        ([1, 2], "bucket 1 came, but bucket 0 of version -1 was expected"),
        ([0, 2], "bucket 2 came, but bucket 1 of version 12 was expected"),
        ([0, 2, 1], "bucket 2 came, but bucket 1"),
        ([0, 1, 1, 2], "bucket 1 came, but bucket 2"),
        ([0, 1, 2, 2], "bucket 2 came, but no more was expected"),
        ([0, 1, 2, 1], "bucket 1 came, but no more was expected"),
    ],
    ids=str,
)
def test_a_set_with_a_lost_doubled_or_reordered_bucket_is_refused(order, message):
    packed = three_buckets()
    with pytest.raises(CorruptWeightsError, match=message):
        receive([packed[index] for index in order], 12)


def test_a_bucket_after_the_last_one_is_refused():
    longer = list(buckets([*some_tensors(), ("more", torch.ones(40))], 12, bucket_bytes=80))
    assert [bucket.index for bucket in longer if bucket.last] == [3]
    with pytest.raises(CorruptWeightsError, match="bucket 3 came, but no more was expected"):
        receive([*three_buckets(), longer[3]], 12)


def test_a_set_of_mixed_versions_is_refused():
    old, new = three_buckets(11), three_buckets(12)
    with pytest.raises(CorruptWeightsError, match="version 11: bucket 1 came, but bucket 1 of version 12"):
        receive([new[0], old[1], new[2]], 12)
    with pytest.raises(CorruptWeightsError, match="version 12 is not complete: 3 buckets of version 11 came"):
        receive(old, 12)


def test_a_name_that_comes_twice_is_refused():
    packed = list(buckets([("a", torch.ones(2)), ("b", torch.ones(2)), ("a", torch.zeros(2))], 4, bucket_bytes=4))
    with pytest.raises(CorruptWeightsError, match="version 4: a came twice"):
        receive(packed, 4)


def test_after_a_refusal_only_bucket_0_starts_a_set():
    incoming, packed = IncomingWeights(), three_buckets()
    incoming.add(packed[0])
    with pytest.raises(CorruptWeightsError):
        incoming.add(packed[2])
    for late in packed[1:]:
        with pytest.raises(CorruptWeightsError, match="bucket 0 of version -1 was expected"):
            incoming.add(late)
    with pytest.raises(CorruptWeightsError, match="not complete"):
        incoming.check_complete(12)
    for bucket in [packed[0], packed[1], *three_buckets(13)]:  # a set that breaks off, and a good one
        incoming.add(bucket)
    incoming.check_complete(13)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_read_only_buckets_are_read_in_place():
    packed = [read_only(bucket) for bucket in three_buckets()]
    receive(packed, 12)
    assert [(n, bits(t)) for n, t in unpack(packed)] == [(n, bits(t)) for n, t in some_tensors()]
    for bucket in packed:
        for entry, (_, tensor) in zip(bucket.entries, bucket.tensors(), strict=True):
            assert tensor.data_ptr() == bucket.values.ctypes.data + 2 * entry.offset


def test_reading_read_only_buckets_gives_no_warning():
    [bucket] = map(read_only, buckets(some_tensors(), 1))
    torch.set_warn_always(True)  # else PyTorch warns once per process, perhaps in an earlier test
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            list(bucket.tensors())
    finally:
        torch.set_warn_always(False)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_empty_tensor_may_be_at_any_position(place):
    named = [("a", torch.ones(2)), ("b", torch.ones(3))]
    named.insert(place, ("empty", torch.empty(0, 5)))
    packed = list(buckets(named, 0, bucket_bytes=4))
    receive(packed, 0)
    assert [(n, tuple(t.shape)) for n, t in unpack(packed)] == [(n, tuple(t.shape)) for n, t in named]


def one_bucket(patterns, version, name="w"):
    tensor = torch.tensor(patterns, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    [bucket] = buckets([(name, tensor)], version)
    return bucket


# Bits of bf16 values: 1, 0.0, -0.0, infinity, a quiet NaN, a signalling one with a sign, and 2.
BEFORE = [0x3F80, 0x0000, 0x8000, 0x7F80, 0x7FC0, 0xFF81, 0x4000, *[0x3F80] * 20]


@pytest.mark.parametrize(
    ("place", "pattern"),
    [(0, 0x3F81), (1, 0x8000), (2, 0x0000), (4, 0x7FC1), (5, 0x7F81), (6, 0x7FFF), (26, 0x0001)],
)
def test_a_delta_has_exactly_the_changed_bits(place, pattern):
    after = BEFORE.copy()
    after[place] = pattern
    old, new = one_bucket(BEFORE, 6), one_bucket(after, 7)
    delta = make_delta(old, new)
    assert (delta.positions.tolist(), delta.positions.dtype) == ([place], np.uint32)
    assert delta.values.view(np.uint16).tolist() == [pattern]
    assert (delta.version, delta.base_version, delta.index, delta.last, delta.nbytes) == (7, 6, 0, True, 6)
    found = delta.apply(old)
    assert found.values.view(np.uint16).tolist() == after
    assert (found.version, found.entries, found.checksum) == (7, new.entries, new.checksum)
    assert old.values.view(np.uint16).tolist() == BEFORE  # the base is not modified


def test_the_delta_of_equal_values_has_no_bytes():
    old, new = three_buckets(11)[1], three_buckets(12)[1]
    delta = make_delta(old, new)
    assert delta.nbytes == 0
    assert (delta.apply(old).checksum, delta.apply(old).version) == (new.checksum, 12)


@pytest.mark.parametrize(("changed", "worth_it"), [(8, True), (9, False), (27, False)])
def test_a_delta_is_made_only_if_it_is_smaller_than_the_bucket(changed, worth_it):
    # 27 values are 54 bytes. A changed value takes 6: eight of them take 48, and nine as many as the bucket.
    after = [0x4100] * changed + BEFORE[changed:]
    delta = make_delta(one_bucket(BEFORE, 1), one_bucket(after, 2))
    assert (delta is not None) == worth_it


def test_there_is_no_delta_between_different_layouts():
    old = three_buckets(1)
    assert make_delta(old[0], three_buckets(2)[1]) is None
    assert make_delta(one_bucket(BEFORE, 1), one_bucket(BEFORE, 2, name="v")) is None
    assert make_delta(*buckets([("a", torch.empty(0))], 1), *buckets([("a", torch.empty(0))], 2)) is None


def sparse_delta():
    old = one_bucket(BEFORE, 6)
    return old, make_delta(old, one_bucket([0x4100, *BEFORE[1:20], 0x4200, *BEFORE[21:]], 7))


def test_a_delta_on_another_base_is_refused():
    old, delta = sparse_delta()
    with pytest.raises(CorruptWeightsError, match="bucket 0 since version 6 was applied to bucket 0 of version 5"):
        delta.apply(one_bucket(BEFORE, 5))
    with pytest.raises(CorruptWeightsError, match="was applied to bucket 1 of version 6"):
        delta.apply(replace(old, index=1))
    for other in (BEFORE[:-1], [*BEFORE[:5], 0x0001, *BEFORE[6:]], BEFORE[:4]):  # these claim to be version 6, too
        with pytest.raises(CorruptWeightsError, match="version 7: bucket 0 has checksum"):
            delta.apply(one_bucket(other, 6))
    delta.apply(old)


@pytest.mark.parametrize("field", ["positions", "values"])
@pytest.mark.parametrize(("place", "bit"), [(0, 0), (1, 15), (1, 4)])
def test_one_flipped_bit_of_a_delta_is_refused(field, place, bit):
    old, delta = sparse_delta()
    damaged = getattr(delta, field).copy()
    damaged.view(f"u{damaged.itemsize}")[place] ^= 1 << bit
    with pytest.raises(CorruptWeightsError, match="delta of bucket 0 since version 6 has checksum"):
        replace(delta, **{field: damaged}).apply(old)


@pytest.mark.parametrize("field", ["version", "index", "base_version", "bucket_checksum", "last"])
def test_the_header_of_a_delta_is_part_of_its_checksum(field):
    old, delta = sparse_delta()
    damaged = not delta.last if field == "last" else getattr(delta, field) + 1
    with pytest.raises(CorruptWeightsError, match="has checksum"):
        replace(delta, **{field: damaged}).apply(old)


def test_a_publication_has_each_bucket_its_best_form_and_a_manifest():
    moved = [(name, tensor + 1 if name == "cube" else tensor) for name, tensor in some_tensors()]
    packed = list(buckets(moved, 13, bucket_bytes=80))
    *stream, manifest = publication(packed, [read_only(b) for b in three_buckets()])
    new, best = stream[::2], stream[1::2]
    assert new == packed
    # 30 of the 36 values of bucket 1 have changed: its delta would be larger than the bucket.
    assert [type(item) for item in best] == [Delta, Bucket, Delta]
    assert manifest == Manifest((80, 72, 56), (0, 72, 0))
    applied = [best[0].apply(three_buckets()[0]), best[1], best[2].apply(three_buckets()[2])]
    receive(applied, 13)
    assert [(n, bits(t)) for n, t in unpack(applied)] == [(n, bits(t)) for n, t in moved]


def test_without_a_base_there_are_no_deltas():
    packed = three_buckets(13)
    *stream, manifest = publication(packed)
    assert stream == packed
    assert manifest == Manifest((80, 72, 56), (80, 72, 56))


def test_a_bucket_beyond_the_base_is_its_own_best_form():
    *stream, manifest = publication(three_buckets(13), three_buckets(12)[:1])
    assert [type(item) for item in stream[1::2]] == [Delta, Bucket, Bucket]
    assert manifest.best_bytes == (0, 72, 56)
