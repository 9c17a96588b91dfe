"""The prompt stream's order and its state."""

import json

import numpy as np
import pytest

from common.data.prompt_records import PromptRecord
from common.errors import UserError
from common.types import SampleId
from learner.loop.prompts import PromptStream, heldout_prompts


def said(index):
    return [{"role": "user", "content": f"question {index}"}]


def stream(*, prompts=5, seed=0, rollouts_per_prompt=1):
    records = [
        PromptRecord(f"question {i}", np.array([i], np.int32), {"answer": i}, said(i) if i % 2 else None)
        for i in range(prompts)
    ]
    return PromptStream(records, seed=seed, rollouts_per_prompt=rollouts_per_prompt)


def take(prompts, count):
    return [prompts.next().sample_id for _ in range(count)]


# The stream


def test_the_order_is_a_function_of_the_seed():
    assert take(stream(seed=3), 20) == take(stream(seed=3), 20)
    assert take(stream(prompts=50, seed=3), 50) != take(stream(prompts=50, seed=4), 50)


def test_each_epoch_is_a_permutation_of_all_prompts_and_epochs_differ():
    ids = take(stream(prompts=20), 60)
    epochs = [ids[:20], ids[20:40], ids[40:]]
    assert [[i.epoch for i in epoch] for epoch in epochs] == [[0] * 20, [1] * 20, [2] * 20]
    orders = [[i.prompt for i in epoch] for epoch in epochs]
    assert [sorted(order) for order in orders] == [list(range(20))] * 3
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_prompt_is_issued_rollouts_per_prompt_times_in_a_row():
    ids = take(stream(prompts=4, rollouts_per_prompt=3), 24)
    assert [i.replica for i in ids] == [0, 1, 2] * 8
    assert [i.epoch for i in ids] == [0] * 12 + [1] * 12
    runs = [ids[k : k + 3] for k in range(0, 24, 3)]
    assert all(len({(i.epoch, i.prompt) for i in run}) == 1 for run in runs)
    assert sorted(run[0].prompt for run in runs[:4]) == [0, 1, 2, 3]
    assert len(set(ids)) == 24


def test_the_order_of_prompts_does_not_depend_on_rollouts_per_prompt():
    single = [i.prompt for i in take(stream(prompts=9), 18)]
    assert [i.prompt for i in take(stream(prompts=9, rollouts_per_prompt=2), 36)[::2]] == single


def test_a_prompt_carries_the_record_that_its_id_names():
    prompts = stream()
    for _ in range(5):
        prompt = prompts.next()
        index = prompt.sample_id.prompt
        assert (prompt.text, prompt.token_ids.tolist(), prompt.fields) == (
            f"question {index}",
            [index],
            {"answer": index},
        )
        assert prompt.messages == (said(index) if index % 2 else None)


def test_settled_samples_leave_the_state_and_the_others_keep_their_order():
    prompts = stream()
    ids = take(prompts, 5)
    prompts.settle([ids[3], ids[0]])
    state = prompts.state()
    assert (state["issued"], state["outstanding"]) == (5, [[1, 3], [4, 5]])
    assert prompts.outstanding == [ids[1], ids[2], ids[4]]
    prompts.settle(ids[1:3] + ids[4:])
    assert (prompts.state()["outstanding"], prompts.outstanding) == ([], [])


def test_the_state_does_not_grow_with_what_is_outstanding():
    prompts = stream(rollouts_per_prompt=1)
    ids = take(prompts, 20_000)
    prompts.settle(ids[:64])
    assert prompts.state()["outstanding"] == [[64, 20_000]]


def test_settling_what_is_not_outstanding_is_an_error():
    prompts = stream()
    ids = take(prompts, 2)
    prompts.settle(ids[:1])
    for unknown in (ids[0], SampleId(9, 0, 0)):  # trained twice; never issued
        with pytest.raises(KeyError):
            prompts.settle([unknown])


def test_what_is_given_back_is_asked_next_and_stays_outstanding():
    once = stream(rollouts_per_prompt=1)
    issued = [once.next().sample_id for _ in range(4)]
    once.settle([issued[0]])
    once.give_back([issued[1], issued[3]])
    assert once.outstanding == issued[1:]
    assert [once.next().sample_id for _ in range(2)] == [issued[1], issued[3]]
    assert once.next().sample_id not in issued
    restored = stream(rollouts_per_prompt=1)
    restored.restore(once.state())
    assert restored.next().sample_id == issued[1]


def test_a_restored_stream_continues_like_an_uninterrupted_one():
    uninterrupted = take(stream(rollouts_per_prompt=2), 60)
    prompts = stream(rollouts_per_prompt=2)
    ids = take(prompts, 17)  # in the middle of epoch 1, between two replicas
    prompts.settle([i for i in ids if i not in (ids[2], ids[7], ids[16])])
    state = json.loads(json.dumps(prompts.state()))  # as the journal keeps it

    restored = stream(rollouts_per_prompt=2)
    restored.restore(state)
    assert restored.state() == state
    reissued = [restored.next() for _ in range(3)]
    assert [p.sample_id for p in reissued] == [ids[2], ids[7], ids[16]]
    assert [p.text for p in reissued] == [f"question {i.prompt}" for i in (ids[2], ids[7], ids[16])]
    assert [p.messages for p in reissued] == [
        said(i.prompt) if i.prompt % 2 else None for i in (ids[2], ids[7], ids[16])
    ]
    assert restored.state() == state  # issued again, still outstanding
    assert take(restored, 43) == uninterrupted[17:]
    restored.settle([ids[7]])
    assert restored.outstanding == [ids[2], ids[16], *uninterrupted[17:]]


def test_a_state_taken_while_reissuing_restores_the_same_samples():
    prompts = stream()
    ids = take(prompts, 4)
    once = stream()
    once.restore(prompts.state())
    once.next()  # a second crash after one of four
    twice = stream()
    twice.restore(once.state())
    assert take(twice, 5) == [*ids, *take(stream(), 5)[4:]]


def test_a_fresh_state_restores_to_the_whole_stream():
    restored = stream(seed=2)
    restored.restore(stream(seed=2).state())
    assert take(restored, 12) == take(stream(seed=2), 12)


def test_a_state_of_other_prompts_is_refused():
    prompts = stream(prompts=5)
    take(prompts, 5)
    with pytest.raises(UserError):
        stream(prompts=3).restore(prompts.state())


def test_heldout_prompts_have_ids_that_no_training_stream_issues():
    records = [
        PromptRecord("q0", np.array([0], np.int32), {"answer": 0}),
        PromptRecord("q1", np.array([1], np.int32), {"answer": 1}, said(1)),
        PromptRecord("q2", np.array([2], np.int32), {"answer": 2}),
    ]
    prompts = heldout_prompts(records, 2)
    assert [(p.sample_id, p.text, p.fields, p.messages) for p in prompts] == [
        (SampleId(-1, 0, 0), "q0", {"answer": 0}, None),
        (SampleId(-1, 1, 0), "q1", {"answer": 1}, said(1)),
    ]
    assert [p.token_ids.tolist() for p in prompts] == [[0], [1]]
    assert len(heldout_prompts(records, 9)) == 3
