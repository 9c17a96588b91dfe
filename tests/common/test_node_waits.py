"""What a user hears while processes wait for a node."""

from __future__ import annotations

import pytest

from common.config.base import Placed
from common.config.training import TrainerConfig
from common.node_waits import TELL_AFTER_S, TELL_EVERY_S, NodeWaits, RoomMessages, requested


@pytest.mark.parametrize(
    ("asks", "words"),
    [
        (Placed(cpus=1), "1 CPU"),
        (Placed(cpus=0.5, gpus=0.25), "0.5 CPU, 0.25 GPU"),
        (Placed(cpus=16, gpus=8), "16 CPUs, 8 GPUs"),
        (Placed(), "no CPU and no GPU"),
        (
            TrainerConfig(gpus=1, labels={"group": "a", "kind": "b"}),
            "1 CPU, 1 GPU and a node with the labels group=a, kind=b",
        ),
    ],
)
def test_a_request_is_said_in_words(asks, words):
    assert requested(asks) == words


def test_the_first_message_comes_after_a_while_and_later_ones_in_intervals():
    told: list[str] = []
    waits = NodeWaits(Placed(gpus=1), "300 s, a.setting", told.append)
    heard = []
    for second in range(120):
        waits.look({"Rank(0)": float(second)})
        heard += [second] * (len(told) - len(heard))
    assert heard == [TELL_AFTER_S + n * TELL_EVERY_S for n in range(4)]
    assert told[1] == "Rank(0) waits for a node with room: 40 s so far (it asks for 1 GPU; at most 300 s, a.setting)"


def test_the_longest_wait_counts_and_nobody_who_waits_is_silence():
    told: list[str] = []
    waits = NodeWaits(Placed(gpus=1), "300 s", told.append)
    waits.look({})
    assert told == []
    waits.look({"Rank(0)": 1.0, "Rank(3)": 12.4})
    assert told == ["Rank(0), Rank(3) wait for a node with room: 12 s so far (each asks for 1 GPU; at most 300 s)"]


def test_a_later_wait_is_told_as_soon_as_the_first_one():
    told: list[str] = []
    waits = NodeWaits(Placed(gpus=1), "300 s", told.append)
    waits.look({"Rank(0)": 100.0})
    waits.look({})
    waits.look({"Rank(0)": TELL_AFTER_S - 1})
    assert len(told) == 1
    waits.look({"Rank(0)": TELL_AFTER_S})
    assert len(told) == 2


def test_a_pool_that_makes_room_for_long_says_so_once():
    told: list[str] = []
    room_made = RoomMessages("Generator", told.append)
    for _ in range(2):
        room_made.look({})
        room_made.look({"Learner": TELL_AFTER_S - 1})
        assert not told
        room_made.look({"Learner": TELL_AFTER_S, "Reward": 1.0})
        room_made.look({"Learner": TELL_AFTER_S + 60})
        assert told == ["Generator: no extra replicas until Learner and Reward have nodes"]
        told.clear()
