"""The clock of tests that wait."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests import virtual_clock


def test_waits_take_their_time_on_this_clock_and_none_on_others():
    began = time.perf_counter()

    async def main() -> list[float]:
        start = time.monotonic()
        ends: list[float] = []

        async def wait(seconds: float) -> None:
            await asyncio.sleep(seconds)
            ends.append(time.monotonic() - start)

        await asyncio.gather(wait(3600), wait(60), wait(0.5))
        assert asyncio.get_running_loop().time() == time.monotonic()
        return ends

    assert virtual_clock.run(main()) == pytest.approx([0.5, 60, 3600])
    assert time.perf_counter() - began < 600


def test_the_clock_stands_still_while_something_runs():
    async def main() -> float:
        start = time.monotonic()
        time.sleep(0.05)
        for _ in range(100):
            await asyncio.sleep(0)
        return time.monotonic() - start

    assert virtual_clock.run(main()) == 0


def test_a_limit_that_is_shorter_than_the_wait_ends_it():
    async def main() -> None:
        async with asyncio.timeout(59):
            await asyncio.sleep(60)

    with pytest.raises(TimeoutError):
        virtual_clock.run(main())


def test_the_clock_of_other_code_is_as_before():
    real = time.monotonic
    virtual_clock.run(asyncio.sleep(1))
    assert time.monotonic is real
