"""Process metrics: how values are recorded, under which tags, and what is refused."""

from __future__ import annotations

import re

import pytest

from common.metrics import meters
from common.metrics.table import METERS
from tests.fakes import OWN_TAGS, metered


def test_counters_add_up_gauges_keep_the_newest_histograms_keep_all():
    memory = metered()
    for value in (3, 0, 4):
        meters.count("ratchet_generator_tokens_total", value)
        meters.gauge("ratchet_generator_weights_version", value)
        meters.observe("ratchet_batch_tokens", value)
    assert memory.read("ratchet_generator_tokens_total", **OWN_TAGS) == [7]
    assert memory.read("ratchet_generator_weights_version", **OWN_TAGS) == [4]
    assert memory.read("ratchet_batch_tokens", **OWN_TAGS) == [3, 0, 4]


def test_values_under_different_tags_are_kept_apart():
    memory = metered()
    meters.count("ratchet_reward_voids_total", source="a")
    meters.count("ratchet_reward_voids_total", 2, source="b")
    meters.install(memory, role="Role", replica="Role(1)")
    meters.count("ratchet_reward_voids_total", 5, source="b")
    found = [memory.read("ratchet_reward_voids_total", **OWN_TAGS, source=source) for source in "abc"]
    assert found == [[1], [2], []]
    assert memory.read("ratchet_reward_voids_total", role="Role", replica="Role(1)", source="b") == [5]


def test_a_pools_meters_carry_the_pools_role_not_the_processs():
    memory = metered()
    meters.gauge("ratchet_pool_replicas", 3, role="Generator", state="ready")
    assert memory.read("ratchet_pool_replicas", role="Generator", state="ready") == [3]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (lambda: meters.count("ratchet_made_up_total"), "ratchet_made_up_total is not a declared counter; declare it"),
        (lambda: meters.gauge("ratchet_generator_tokens_total", 1), "is not a declared gauge"),
        (lambda: meters.count("ratchet_generator_tokens_total", -1), "cannot go down by 1"),
        (lambda: meters.count("ratchet_reward_voids_total"), "takes the tags"),
        (lambda: meters.count("ratchet_generator_tokens_total", colour="red"), "takes the tags"),
    ],
)
def test_undeclared_names_kinds_and_tags_are_refused(record, message):
    memory = metered()
    with pytest.raises(ValueError, match=message):
        record()
    assert not memory._values


@pytest.mark.parametrize("meter", METERS.values(), ids=list(METERS))
def test_a_name_follows_prometheus_conventions(meter):
    assert re.fullmatch(r"ratchet_[a-z]+(_[a-z]+)*", meter.name)
    assert meter.name.endswith("_total") == (meter.kind == "counter")
    assert meter.name.endswith("_seconds") == (meter.unit == "seconds")
    assert bool(meter.buckets) == (meter.kind == "histogram")
    assert list(meter.buckets) == sorted(set(meter.buckets))
    assert all(bucket > 0 for bucket in meter.buckets)  # Ray takes no others
