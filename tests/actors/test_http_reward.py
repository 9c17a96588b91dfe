"""The HTTP reward source against services on loopback that answer, stall, fail and lie, and where scores are from."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from aiohttp import web

from actors.http_reward import HttpSource, HttpSourceError
from common.config import HttpSourceConfig
from common.types import Raw, RewardInput

ANSWER = RewardInput("question", "yes", 2, "stop", {"expected": "yes"})
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "question"}]


@asynccontextmanager
async def service(handler):
    """A server on a free loopback port; yields its URL."""
    app = web.Application()
    app.router.add_post("/score", handler)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/score"
    finally:
        await runner.cleanup()


def source(*urls: str, **settings) -> HttpSource:
    return HttpSource(HttpSourceConfig(name="judge", urls=urls, **{"backoff_s": 0.01, **settings}))


async def close(*sources: HttpSource) -> None:
    for each in sources:
        if each._session is not None:
            await each._session.close()


def test_the_answer_travels_as_json_and_the_score_comes_back_with_the_address():
    async def scenario():
        seen = []

        async def handler(request):
            seen.append(await request.json())
            return web.json_response({"score": 0.25})

        async with service(handler) as url:
            judge = source(url)
            found = await judge(ANSWER), await judge(replace(ANSWER, messages=MESSAGES))
            await close(judge)
        return url, found, seen

    url, found, seen = asyncio.run(scenario())
    assert found == (Raw(0.25, url), Raw(0.25, url))
    plain = {
        "prompt": "question",
        "response": "yes",
        "response_tokens": 2,
        "finish_reason": "stop",
        "fields": {"expected": "yes"},
        "messages": None,
    }
    assert seen == [plain, {**plain, "messages": MESSAGES}]


def test_the_origin_names_the_model_of_each_answer_and_the_address_that_gave_it():
    async def scenario():
        answers = iter([{"score": 1, "model": "grader v1"}, {"score": 2, "model": "grader v2"}, {"score": 3}])

        async def working(request):
            return web.json_response(next(answers))

        async def broken(request):
            return web.json_response({"model": "no score"})

        async with service(broken) as one, service(working) as other:
            judge = source(one, other)
            found = [await judge(ANSWER) for _ in range(3)]
            await close(judge)
        return found, other

    found, url = asyncio.run(scenario())
    assert found == [Raw(1.0, f"grader v1 at {url}"), Raw(2.0, f"grader v2 at {url}"), Raw(3.0, url)]


def test_a_failing_address_is_left_for_another_and_a_passing_fault_is_tried_again():
    async def scenario():
        tries = {"broken": 0, "shaky": 0}

        async def broken(request):
            tries["broken"] += 1
            return web.Response(status=500)

        async def shaky(request):
            tries["shaky"] += 1
            return web.Response(status=503) if tries["shaky"] == 1 else web.json_response({"score": 1})

        async with service(broken) as one, service(shaky) as other:
            judge = source(one, other)
            score, origin, _ = await judge(ANSWER)
            await close(judge)
        return score, tries, origin == other

    # broken, shaky (first time: 503), broken again (each has failed once), shaky.
    assert asyncio.run(scenario()) == (1.0, {"broken": 2, "shaky": 2}, True)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (web.Response(status=500), "500"),
        (web.Response(text="not json", content_type="application/json"), "JSONDecodeError"),
        (web.json_response({"points": 1}), "KeyError"),
        (web.json_response({"score": "high"}), "ValueError"),
        (None, "TimeoutError"),
    ],
)
def test_a_source_that_stays_broken_raises_with_its_last_failure(answer, message):
    async def scenario():
        over = asyncio.Event()

        async def handler(request):
            await request.read()
            if answer is None:
                await over.wait()
                return web.Response()
            return web.Response(status=answer.status, body=answer.body, content_type=answer.content_type)

        async with service(handler) as url:
            judge = source(url, retries=1, request_timeout_s=0.2)
            try:
                await judge(ANSWER)
            finally:
                over.set()  # or the server would wait for its handler
                await close(judge)

    with pytest.raises(HttpSourceError, match=rf"gave up after 2 tries.*{message}"):
        asyncio.run(scenario())


def test_nobody_listening_is_a_failure_too():
    with pytest.raises(HttpSourceError, match="ClientConnectorError"):
        asyncio.run(source("http://127.0.0.1:9/score", retries=0)(ANSWER))


def test_requests_are_bounded_and_spread_over_the_addresses():
    async def scenario():
        now, peak = {"a": 0, "b": 0}, {"a": 0, "b": 0}

        def handler(name):
            async def handle(request):
                now[name] += 1
                peak[name] = max(peak[name], now[name])
                await asyncio.sleep(0.02)
                now[name] -= 1
                return web.json_response({"score": 1})

            return handle

        async with service(handler("a")) as one, service(handler("b")) as other:
            judge = source(one, other, concurrency=6)
            await asyncio.gather(*(judge(ANSWER) for _ in range(30)))
            await close(judge)
        return peak

    assert asyncio.run(scenario()) == {"a": 3, "b": 3}
