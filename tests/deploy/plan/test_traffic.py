"""Bytes of a step between nodes, against an enumeration of every transfer; and against recorded runs."""

import pytest

from common.credit_table import DERIVED_SCHEMA
from common.model.size import ModelSize
from deploy.plan.needs import Need
from deploy.plan.placement import Place, Placement
from deploy.plan.traffic import CREDIT_BYTES, homes, traffic
from deploy.plan.work import Lengths
from tests.bench.batch import config

SIZE = ModelSize(parameters=1000, layers=2, hidden=10, heads=2, kv_heads=1, head_dim=5, vocabulary=20, context=99)
HOMES = {"learner": [0, 0, 1, 1], "generators": [0, 1, 2, 2], "reward": [0], "reference": [1, 2]}


def flows(nodes=HOMES, **sections):
    tree = {"rollouts_per_step": 8, "learner": {"ranks": len(nodes["learner"]), "micro_batch_tokens": 40}}
    found = traffic(config("", **(tree | sections)), SIZE, nodes, lengths=Lengths(30, 10))
    return {flow.what: (flow.stores, flow.between) for flow in found}


def test_the_nodes_of_a_placement_are_in_the_order_of_the_processes():
    names = [("Generator(10)", "generators", 2), ("Generator(9)", "generators", 1), ("Learner(0)", "learner", 0)]
    places = [Place(Need(name, section, 0, 0, {}), node) for name, section, node in names]
    assert homes(Placement([], places, [])) == {"learner": [0], "generators": [1, 2]}


def test_everything_on_one_node_sends_nothing():
    found = flows({"learner": [0], "generators": [0, 0], "reward": [0], "reference": [0]})
    assert {between for _, between in found.values()} == {0}
    assert found["weights"] == (2000, 0)
    assert found["batch"] == (8 * 40 * 20, 0)


def test_each_other_node_with_generators_fetches_the_weights_once():
    assert flows()["weights"] == (2000, 2 * 2000)  # nodes 1 and 2; two generators on node 2 share its store


def test_rollouts_go_to_reward_reference_and_driver():
    rollout, sent = 40 * 20, 0.0
    for generator in HOMES["generators"]:  # each writes two of the eight, and replicas share them evenly
        for reference in HOMES["reference"]:
            sent += 2 * rollout / 2 * (generator != reference)
        sent += 2 * rollout * (generator != 0)  # to the reward replica
        sent += 2 * rollout * (generator != 0)  # to the driver
    assert flows()["rollouts"] == (8 * rollout, pytest.approx(sent))
    assert flows()["reference log-probabilities"] == (8 * 10 * 4, 8 * 10 * 4)  # both replicas are on other nodes


def test_each_other_node_with_ranks_fetches_the_batch_once():
    assert flows()["batch"] == (8 * 40 * 20, 8 * 40 * 20)


def test_sharded_ranks_exchange_weights_and_gradients():
    # Each of four ranks has two rollouts, and a micro-batch holds one. A ring passes 3/4 of everything over each of the
    # two links between the nodes.
    weights, gradients = 2 * 1000, 4 * 1000
    passes_without, passes_with = 2, 2
    moved = passes_without * weights + passes_with * (weights + weights + gradients)
    assert flows(ppo={"ppo_epochs": 1})["weights and gradients among ranks"] == (0, 2 * 0.75 * moved)
    one_node = flows({**HOMES, "learner": [0, 0]})
    assert "weights and gradients among ranks" not in one_node


def test_a_run_with_adapters_has_no_reference_replicas():
    found = flows({"learner": [0], "generators": [1], "reward": [0]}, learner={"lora": {"rank": 1}})
    assert found["rollouts"] == (6400, 2 * 6400)
    assert found["reference log-probabilities"] == (320, 0)


def test_the_credit_table_has_as_many_bytes_as_its_columns():
    floats = sum(1 for column in DERIVED_SCHEMA if str(column.type) == "list<item: float>")
    assert 4 * floats + (len(DERIVED_SCHEMA) - floats) == CREDIT_BYTES
    assert flows()["values of each token"] == (CREDIT_BYTES * 80, 0)
    assert "values of each token" not in flows(credit={"every": 0})
