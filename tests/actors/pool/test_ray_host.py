"""Ray's own functions behind a pool, when they do not answer. Without Ray: they are replaced."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from ray.exceptions import ObjectLostError

from actors.pool import ray_host
from actors.pool.ray_host import RayHost
from common.config.base import Replicated
from common.errors import RolloutLostError
from tests.actors.pool.scenario import Worker


class Frozen:
    """A function that answers only after `thaw`, like one that asks a frozen process."""

    def __init__(self) -> None:
        self.calls = 0
        self._thawed = threading.Event()

    def __call__(self, *args: Any) -> dict[str, int]:
        self.calls += 1
        self._thawed.wait()
        return {"a node": 0}

    def thaw(self) -> None:
        self._thawed.set()


@pytest.fixture
def frozen(monkeypatch) -> Iterator[Frozen]:
    function = Frozen()
    monkeypatch.setattr(ray_host.ray_state.state, "get_draining_nodes", function)
    monkeypatch.setattr(ray_host.ray_state, "actors", function)
    monkeypatch.setattr(ray_host.ray, "kill", function)
    monkeypatch.setattr(ray_host, "DIRECTORY_S", 0.05)
    yield function
    function.thaw()


def host(timeout_s: float = 5) -> RayHost:
    return RayHost(Worker, Replicated(timeout_s=timeout_s))


class Handle:
    """As much of an actor's handle as the directory needs."""

    _actor_id = bytes(16)


def run(scenario: Any) -> Any:
    """As in a run: at the end asyncio.run would wait for threads of its own."""
    return asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_directory_that_does_not_answer_is_an_outage(frozen):
    async def scenario() -> None:
        it = host()
        for question in (it.leaving_nodes, lambda: it.node(Handle())):
            with pytest.raises(it.outages):
                await question()

    run(scenario)


def test_a_question_without_an_answer_is_not_asked_again(frozen, monkeypatch):
    async def scenario() -> None:
        it = host()
        for _ in range(3):
            with pytest.raises(it.outages):
                await it.leaving_nodes()
        assert frozen.calls == 1
        monkeypatch.setattr(ray_host, "DIRECTORY_S", 5)  # the machine may be busy
        frozen.thaw()
        assert await it.leaving_nodes() == {"a node": float("inf")}
        assert await it.leaving_nodes() == {"a node": float("inf")}
        assert frozen.calls in (2, 3)  # the first answer may have arrived before it was asked for

    run(scenario)


def test_a_fault_of_the_pool_itself_is_no_outage(frozen):
    assert not issubclass(KeyError, host().outages)


def test_a_kill_returns_at_once(frozen):
    async def scenario() -> None:
        order = host().kill(Handle(), close=False)
        assert not order.done()
        frozen.thaw()
        await asyncio.wrap_future(order)

    run(scenario)


class Opening(Worker):
    """A role that has something to close."""

    CLOSE_S = 0.5

    async def close_all(self) -> None: ...


@pytest.mark.parametrize(
    ("role", "close", "orders"),
    [
        (Opening, True, ["close_all within 0.5 s", "kill"]),
        (Opening, False, ["kill"]),  # it is dead, or was never ready
        (Worker, True, ["kill"]),
    ],
)
@pytest.mark.parametrize("error", [None, TimeoutError("frozen"), ConnectionError("dead")])
def test_a_role_that_has_something_to_close_closes_it_before_its_process_ends(role, close, orders, error, monkeypatch):
    given = []

    class Asked(Handle):
        class close_all:
            remote = staticmethod(lambda: "close_all")

    def get(call: str, timeout: float) -> None:
        given.append(f"{call} within {timeout:g} s")
        if error is not None:
            raise error

    monkeypatch.setattr(ray_host.ray, "get", get)
    monkeypatch.setattr(ray_host.ray, "kill", lambda handle: given.append("kill"))
    RayHost(role, Replicated()).kill(Asked(), close=close).result(10)
    assert given == orders


class Reference:
    """In place of ray.ObjectRef."""

    def __init__(self, outcome: Any) -> None:
        self._outcome = outcome

    def as_future(self) -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().create_future()
        if isinstance(self._outcome, Exception):
            future.set_exception(self._outcome)
        elif self._outcome is not None:
            future.set_result(self._outcome)
        return future


def test_values_that_are_gone_or_do_not_arrive_are_lost_in_their_place(monkeypatch):
    monkeypatch.setattr(ray_host.ray, "ObjectRef", Reference)

    async def scenario() -> list[Any]:
        gone = Reference(ObjectLostError("00" * 28, None, ""))
        return await host(timeout_s=0.05).fetch([Reference("here"), gone, "no reference", Reference(None)])

    here, gone, unchanged, late = run(scenario)
    assert (here, unchanged) == ("here", "no reference")
    assert isinstance(gone, RolloutLostError)
    assert isinstance(gone.__cause__, ObjectLostError)
    assert isinstance(late, RolloutLostError)
    assert str(late) == "its tokens did not arrive within 0.05 s (timeout_s)"


def test_other_errors_of_a_value_are_raised(monkeypatch):
    monkeypatch.setattr(ray_host.ray, "ObjectRef", Reference)
    with pytest.raises(ValueError, match="of the role"):
        run(lambda: host().fetch([Reference(ValueError("of the role"))]))


def test_an_argument_that_the_role_does_not_have_is_refused_at_once():
    with pytest.raises(TypeError, match="unexpected keyword argument 'size'"):
        RayHost(Worker, Replicated(), size=3)
