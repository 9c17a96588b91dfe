"""Who runs where: the node and the GPUs of each process, and the processes without room."""

from dataclasses import replace

from deploy.plan.capacity import refusal
from deploy.plan.placement import Node, place
from tests.deploy.plan.test_capacity import need


def where(placement):
    return {p.need.name: (p.node, p.gpus) for p in placement.places}


def test_each_process_has_a_node_and_its_gpus():
    wanted = [need("half", gpus=0.5), need("two", gpus=2), need("rest", gpus=0.5), need("cpu", memory=5)]
    placement = place(wanted, [Node("a", 0, 2, 4), Node("b", 0, 1, 9)])
    assert placement.fits
    # "two" fills a's GPUs; the shares go to b's only one; a has too little memory for "cpu"
    assert where(placement) == {"two": (0, (0, 1)), "half": (1, (0,)), "rest": (1, (0,)), "cpu": (1, ())}


def test_processes_without_room_are_listed_and_the_others_placed():
    wanted = [need("wide", cpus=3), need("heavy", memory=20), need("small", cpus=1, memory=1)]
    placement = place(wanted, [Node("a", 2, 0, 10), Node("b", 1, 0, 10)])
    assert not placement.fits
    lacking = {missing.need.name: [tuple(node) for node in missing.lacking] for missing in placement.no_room}
    # CPUs, GPUs, memory, memory of a GPU, object store, labels of each node
    assert lacking == {
        "wide": [(True, False, False, False, False, False)] * 2,
        "heavy": [(False, False, True, False, False, False)] * 2,
    }
    assert where(placement) == {"small": (0, ())}
    assert {n.name for n in placement.needs} == {n.name for n in wanted}


def test_a_role_with_labels_goes_only_to_nodes_that_have_them():
    nodes = [Node("large", 9, 0, 99, labels={"ray.io/node-id": "a"}), Node("small", 1, 0, 9, labels={"group": "g"})]
    asks = replace(need("asks", cpus=1, memory=1), labels={"group": "g"})
    assert where(place([asks, need("any", cpus=1, memory=2)], nodes)) == {"asks": (1, ()), "any": (0, ())}
    assert where(place([asks], [Node("unknown", 1, 0, 9)])) == {"asks": (0, ())}  # such as one that options describe
    second = place([asks, replace(asks, name="second")], nodes)
    assert not second.fits
    message = refusal(second)
    assert "only nodes with the Ray label group=g may have it (generators.labels)" in message


def test_with_an_autoscaler_processes_that_reserve_something_wait_for_nodes():
    """Ranks are placed first, and need room. Ray starts what reserves nothing at once."""
    rank = need("Learner(0)", gpus=0.5, memory=4, section="learner")
    engine, service = need("Generator(0)", gpus=1, memory=1), need("Reward(0)", memory=5, section="reward")
    nodes = [Node("a", 4, 1, 10)]
    placement = place([engine, rank, service], nodes, autoscaler=True)
    assert where(placement) == {"Learner(0)": (0, (0,)), "Reward(0)": (0, ())}
    assert (placement.fits, placement.waiting, placement.no_room) == (True, [engine], [])
    assert {n.name for n in placement.needs} == {"Learner(0)", "Generator(0)", "Reward(0)"}
    assert not place([engine, rank, service], nodes).fits
    assert where(place([engine, service], nodes, autoscaler=True)) == {"Generator(0)": (0, (0,)), "Reward(0)": (0, ())}
    for lacks, why in ((replace(rank, gpus=2), "ranks must find room when"), (service, "it reserves neither CPUs nor")):
        without = place([lacks], [Node("a", 4, 1, 4)], autoscaler=True)
        assert (without.fits, without.waiting) == (False, [])
        assert f"; the autoscaler adds no node for it, because {why}" in refusal(without)
    assert place([replace(service, cpus=1)], [Node("a", 4, 1, 4)], autoscaler=True).fits
