"""What a run keeps in object stores, the size of its own store, and a running cluster whose stores are too small."""

from dataclasses import replace

import pytest

from common.config.base import RayConfig
from common.config.ppo import Config
from common.errors import UserError
from common.memory import MIB
from deploy.plan.needs import needs, service_needs
from deploy.plan.object_store import generator_store, learner_store, sized
from deploy.plan.placement import Node
from tests.deploy.plan.shapes import check_fits
from tests.deploy.plan.test_capacity import MODEL

REWARDS = {"sources": [{"name": "s", "function": "m:f"}]}
# 8 rollouts of 30 + 20 tokens, 20 bytes each: a batch has 8000 bytes.
SHORT = {"prompts": {"train": "t", "max_tokens": 30}, "sampling": {"max_new_tokens": 20}, "rollouts_per_step": 8}
WEIGHTS = 2_600_000  # 1 million in bf16, and 30 % more


def config(**sections):
    return Config.model_validate({"reward": REWARDS, **SHORT, **sections})


@pytest.mark.parametrize(
    ("settings", "rollouts"),
    [
        (
            {"max_staleness": 0},
            20_800,
        ),  # 1.3 of 2 batches: the batch and its table; no rollout starts before both are gone
        ({"max_staleness": 1}, 31_200),
        ({"max_staleness": 3}, 52_000),
        # The buffer has no room for 1000 batches: 1.3 * (1,048,576 + 16,000).
        ({"max_staleness": 1000, "buffer_mib": 1}, 1_383_948),
    ],
)
def test_a_store_holds_weights_and_as_many_rollouts_as_may_exist(settings, rollouts):
    cfg = config(**settings)
    assert learner_store(cfg, MODEL) == {"two versions of the weights": 2 * WEIGHTS, "rollouts": rollouts}
    assert generator_store(cfg, MODEL) == {"a version of the weights": WEIGHTS, "rollouts": rollouts}


def test_a_store_whose_size_is_left_out_has_room_for_what_the_run_keeps():
    store = {"weights": 1500 * MIB + 1, "rollouts": 100 * MIB}
    assert sized(RayConfig(), [{}, store, {"weights": 700 * MIB}]).object_store_mib == 1601
    assert sized(RayConfig(), [{"weights": 5 * MIB}]).object_store_mib == 1024
    assert sized(RayConfig(), []).object_store_mib == 1024


def test_a_given_store_that_is_too_small_is_refused_with_its_parts():
    store = {"two versions of the weights": 200 * MIB, "rollouts": 10 * MIB}
    enough = RayConfig(object_store_mib=210)
    assert sized(enough, [{}, store]) == enough
    with pytest.raises(UserError) as caught:
        sized(RayConfig(object_store_mib=209), [{}, store])
    assert str(caught.value) == (
        "ray.object_store_mib (209) must be at least 210, for two versions of the weights (200 MiB) and rollouts (10 "
        "MiB); raise it or leave it out, lower buffer_mib or rollouts_per_step, or use a smaller model"
    )


def test_only_processes_that_get_weights_share_the_store():
    cfg = config(learner={"ranks": 2}, generators={"min": 2})
    found = {need.name: need.store for need in needs(cfg, MODEL) if need.store}
    of_generator = generator_store(cfg, MODEL)
    assert found == {
        "Learner(0)": learner_store(cfg, MODEL),
        "Generator(0)": of_generator,
        "Generator(1)": of_generator,
    }
    assert not any(need.store for need in service_needs(cfg, MODEL))  # an evaluation publishes no weights


def test_nodes_of_a_running_cluster_need_room_for_one_or_two_versions():
    # Large weights, so that rollouts (31,200 bytes) hardly count: a version has 2000 MiB, and 30 % more.
    wanted = needs(config(generators={"gpus": 1, "min": 2}), replace(MODEL, parameters=1000 * MIB))
    room = {"cpus": 8, "memory": 1 << 40}
    one, two = 2601 * MIB, 5201 * MIB
    learner, generators = Node("l", gpus=0, store=two, **room), Node("g", gpus=2, store=one, **room)
    check_fits(wanted, [learner, generators])  # both generators share one version
    check_fits(wanted, [replace(generators, store=two)])
    check_fits(wanted, [replace(generators, store=0)])  # Ray does not say how large it is
    for nodes in ([replace(learner, store=one), generators], [learner, replace(generators, store=2599 * MIB)]):
        with pytest.raises(UserError) as caught:
            check_fits(wanted, nodes)
        name, versions = ("Learner(0)", "two versions of the weights (5200 MiB)")
        if nodes[0] is learner:
            name, versions = ("Generator(0)", "a version of the weights (2600 MiB)")
        assert f"no node has room for {name}" in str(caught.value)
        assert f"object store must have room for {versions} and rollouts (1 MiB)" in str(caught.value)
        assert "ray start --object-store-memory=" in str(caught.value)
