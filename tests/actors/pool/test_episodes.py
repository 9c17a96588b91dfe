"""Episodes over pools of generators and environments, with roles in this process."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np

from actors.pool.episodes import EpisodePool, Waits
from actors.pool.pool import Pool
from common.config.base import Replicated
from common.errors import GivenUpError, RoleError
from common.metrics.meters import InMemory
from common.types import IN_EPISODE, Prompt, Rollout, RolloutRef, SampleId, Turn, Void
from tests.fakes import LocalHost, make_prompt, make_rollout, metered

TURNS = 3  # an episode of the environment below


class Writer:
    """Generators whose turns are two tokens: the number of the turn, and the version."""

    def __init__(self) -> None:
        self.asked: list[tuple[SampleId, int, int | None]] = []  # sample id, tokens begun, preferred replica
        self.fetched: list[Any] = []

    async def generate(self, prompt, *, plain_tokens=0, begun=None, near=None) -> RolloutRef:
        begun = None if begun is None else await begun
        self.asked.append((prompt.sample_id, 0 if begun is None else len(begun.response_ids), near and near.number))
        if near is not None:
            near.number = 7
        if begun is None:
            rollout = make_rollout(prompt, [20, 21])
        else:
            ids = np.concatenate([begun.response_ids, [20 + len(begun.turns), 21]]).astype(np.int32)
            sampled = len(begun.rollout_logprobs) + 2
            rollout = replace(
                begun,
                response_ids=ids,
                rollout_logprobs=np.zeros(sampled, np.float32),
                policy_versions=np.zeros(sampled, np.int32),
                finish_reason="stop",
            )
        await asyncio.sleep(0)
        return replace(RolloutRef.of(rollout), rollout=rollout)

    async def fetch(self, references):
        return references


class Environment:
    """Answers with token 40, and ends the episode after TURNS turns. `deaths`: replicas that die at this turn."""

    deaths: list[int]
    restores = False
    void_at: int | None = None
    slow_at: int | None = None
    log: list[str]

    def __init__(self, name: str) -> None:
        self.name = name

    async def ready(self) -> str:
        return self.name

    async def begin(self, prompt: Prompt, state: Any) -> tuple[Prompt | Void, bool]:
        self.log.append(f"begin {prompt.sample_id} {state}")
        return replace(prompt, token_ids=np.array([3, 9], dtype=np.int32)), self.restores and state is not None

    async def step(self, rollout: Rollout) -> tuple[Rollout | None, RolloutRef | Void, Any]:
        turn = len(rollout.turns) + 1
        if turn in self.deaths:
            self.deaths.remove(turn)
            raise ConnectionError("the replica is gone")
        if turn == self.slow_at:
            await asyncio.sleep(60)
        if turn == self.void_at:
            return None, Void(rollout.prompt.sample_id, "step raised", kind="raised"), None
        end, over = len(rollout.response_ids), turn == TURNS
        ids = rollout.response_ids if over else np.append(rollout.response_ids, np.int32(40))
        rollout = replace(
            rollout,
            response_ids=ids,
            turns=(*rollout.turns, Turn(end, len(ids), 1.0)),
            finish_reason="terminated" if over else IN_EPISODE,
        )
        return rollout, RolloutRef.of(rollout), turn

    async def end(self, sample_id: SampleId) -> None:
        self.log.append(f"end {sample_id}")


def play(prompt: Prompt, *, timeout_s: float = 5, **about: Any) -> tuple[RolloutRef | Exception, Writer, list[str]]:
    """Plays one episode with such an environment: the outcome, the generators, and the calls of the environment."""
    role = type("Environment", (Environment,), {"deaths": [], "log": [], **about})
    writer = Writer()

    async def run() -> RolloutRef | Exception:
        pool = Pool(LocalHost(role), Replicated(max=2, timeout_s=timeout_s))
        await pool.start(timeout_s=5)
        try:
            return await EpisodePool(
                writer, pool, keep=lambda void: replace(void, reason=f"kept: {void.reason}")
            ).generate(prompt)
        except (GivenUpError, RoleError) as error:
            return error
        finally:
            await asyncio.sleep(0.01)
            pool.stop()

    return asyncio.run(run()), writer, role.log


def voids_of(memory: InMemory) -> list[float]:
    """The voids that the driver has counted."""
    return memory.read("ratchet_environment_voids_total", role="Environment", replica="", reason="died")


PROMPT = make_prompt(5)
ID = PROMPT.sample_id
# Three turns of two tokens, and token 40 after the first and the second.
WHOLE = [20, 21, 40, 21, 21, 40, 22, 21]


def test_policy_and_environment_write_in_turns():
    ref, writer, log = play(PROMPT)
    rollout = ref.rollout.result()
    assert ref.finished
    assert rollout.response_ids.tolist() == WHOLE
    assert rollout.response_mask.tolist() == [True, True, False, True, True, False, True, True]
    assert [(turn.end, turn.next_start) for turn in rollout.turns] == [(2, 3), (5, 6), (8, 8)]
    assert rollout.finish_reason == "terminated"
    assert rollout.prompt.token_ids.tolist() == [3, 9]  # as the environment began it
    # The first turn has no preferred generator, the later ones that of the turn before.
    assert writer.asked == [(ID, 0, None), (ID, 3, 7), (ID, 6, 7)]
    assert log == [f"begin {ID} None"]  # an episode that is over is not ended once more


def test_an_episode_whose_environment_dies_begins_again():
    ref, writer, log = play(PROMPT, deaths=[2])
    assert ref.rollout.result().response_ids.tolist() == WHOLE
    assert [begun for _, begun, _ in writer.asked] == [0, 3, 0, 3, 6]
    assert log[0] == f"begin {ID} None"
    assert log[-1] == f"begin {ID} 1"  # the state of turn 1, which this class cannot restore


def test_an_environment_that_restores_its_state_continues_after_the_newest_turn():
    ref, writer, log = play(PROMPT, deaths=[3], restores=True)
    assert ref.rollout.result().response_ids.tolist() == WHOLE
    assert [begun for _, begun, _ in writer.asked] == [0, 3, 6, 6]
    assert [call for call in log if call.startswith("begin")] == [f"begin {ID} None", f"begin {ID} 2"]


def test_an_environment_that_kills_its_replicas_is_given_up():
    memory = metered()
    error, _, _ = play(PROMPT, deaths=[2, 2, 2, 2, 2])
    assert isinstance(error, GivenUpError)
    assert error.kind == "died"
    assert voids_of(memory) == [1]
    died = "3 Environment replicas died while running it: the replica is gone"
    assert str(error) == f"play the episode of prompt {ID}: {died}"


def test_a_prompt_that_kills_generators_is_no_void_of_the_environment(monkeypatch):
    async def generate(self, prompt, **about):
        raise GivenUpError("3 Generator replicas died", role="Generator")

    monkeypatch.setattr(Writer, "generate", generate)
    memory = metered()
    error, _, _ = play(PROMPT)
    assert isinstance(error, GivenUpError)
    assert (str(error), error.kind) == ("3 Generator replicas died", "")
    assert voids_of(memory) == [0]


def test_a_void_of_the_environment_is_kept_and_given_up():
    memory = metered()
    error, writer, _ = play(PROMPT, void_at=2)
    assert isinstance(error, GivenUpError)
    assert (str(error), error.kind) == ("kept: step raised", "raised")
    assert voids_of(memory) == [0]  # the replica counts it
    assert len(writer.asked) == 2


def test_a_call_that_takes_too_long_names_the_episode_and_ends_it():
    error, _, log = play(PROMPT, slow_at=2, timeout_s=0.2)
    assert isinstance(error, RoleError)
    expected = f"one of the Environment replicas did not answer a turn of the episode of prompt {ID} within 0.2 s"
    assert str(error).startswith(expected)
    assert log[-1] == f"end {ID}"


def test_a_wait_is_the_time_in_which_only_environments_are_busy():
    now = 0.0
    waits = Waits(clock=lambda: now)
    with waits.answering():
        now = 1.0
        with waits.writing():
            now = 3.0  # an episode is written while the environment answers another one
        now = 7.0
        assert waits.read() == 1.0 + 4.0
        now = 8.0
    now = 20.0  # nothing is going on
    with waits.writing(), waits.answering():
        now = 30.0
    assert waits.read() == 1.0
