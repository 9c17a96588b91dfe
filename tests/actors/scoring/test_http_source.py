"""The HTTP reward source against services on loopback that answer, stall, fail or send nonsense."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import pickle
import zlib
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from aiohttp import web

from actors.scoring.http_service import HttpSourceError, retry_after
from actors.scoring.http_source import HttpSource
from actors.scoring.kinds import read_secrets
from common.config.sources import HttpSourceConfig
from common.errors import UserError
from common.types import RawScore, RewardInput

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
        await each.close()


def test_an_answer_is_sent_as_json_and_a_score_comes_back():
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
    assert found == (RawScore(0.25, url), RawScore(0.25, url))
    plain = {
        "prompt": "question",
        "response": "yes",
        "response_tokens": 2,
        "finish_reason": "stop",
        "fields": {"expected": "yes"},
        "messages": None,
    }
    assert seen == [plain, {**plain, "messages": MESSAGES}]


def test_the_origin_names_model_and_address_of_each_answer():
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
    assert found == [RawScore(1.0, f"grader v1 at {url}"), RawScore(2.0, f"grader v2 at {url}"), RawScore(3.0, url)]


def test_a_failed_request_goes_to_another_address():
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
        (web.Response(status=500, text="KeyError: 'x'"), "HTTP 500: KeyError: 'x'"),
        (web.Response(text="not json", content_type="application/json"), "JSONDecodeError"),
        (web.json_response({"points": 1}), "the answer has no 'score'; its keys are 'points'"),
        (web.json_response({"score": "high"}), "must hold a number, not 'high'"),
        (None, "no whole answer within request_timeout_s"),
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


def test_an_address_where_nothing_listens_is_a_failure():
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


# A hostile or broken service


def ask_once(handler, **settings) -> tuple[RawScore | str, str]:
    """The result or error of one request to the handler, and its address."""

    async def scenario():
        async with service(handler) as url:
            judge = source(url, **{"retries": 0, **settings})
            try:
                return await judge(ANSWER), url
            except HttpSourceError as error:
                return str(error), url
            finally:
                await close(judge)

    return asyncio.run(scenario())


def answers(**answer):
    async def handler(request):
        return web.json_response(answer)

    return handler


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"score": "0.7"}, "\"score\" must hold a number, not '0.7'"),
        ({"score": True}, '"score" must hold a number, not True'),
        ({"score": None}, '"score" must hold a number, not None'),
        ({"score": [1]}, '"score" must hold a number, not [1]'),
        ({"score": 10**40}, '"score" must hold a number that float32 holds, not 1000'),
        ({"score": float("nan")}, '"score" must hold a number that float32 holds, not nan'),
        ({"score": 1, "model": "\ud800"}, '"model" must be printable text of at most 200 characters'),
        ({"score": 1, "model": "x" * 201}, '"model" must be printable text of at most 200 characters'),
        ({"score": 1, "model": "a\x1b[2Jb"}, '"model" must be printable text of at most 200 characters'),
        ({"score": 1, "model": ["grader"]}, '"model" must be printable text of at most 200 characters'),
    ],
)
def test_a_score_must_be_a_number_and_a_model_a_short_text(answer, message):
    found, _ = ask_once(answers(**answer))
    assert message in found


@pytest.mark.parametrize("packed", [None, "gzip", "deflate"])
def test_an_answer_beyond_the_limit_is_not_read_to_its_end(packed):
    sent = []

    async def handler(request):
        headers = {} if packed is None else {"Content-Encoding": packed}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        packer = zlib.compressobj(wbits=31 if packed == "gzip" else 15) if packed else None
        try:
            for _ in range(200):  # 200 MiB of spaces
                part = b" " * (1 << 20)
                await response.write(
                    part if packer is None else packer.compress(part) + packer.flush(zlib.Z_SYNC_FLUSH)
                )
                sent.append(1)
        except ConnectionError:
            pass
        return response

    found, _ = ask_once(handler, max_answer_kib=64)
    assert "the answer is longer than max_answer_kib (64)" in found
    assert packed or len(sent) < 100  # it hung up; a compressed answer of that length is too short to tell


def test_a_compressed_answer_within_the_limit_is_read():
    async def handler(request):
        body = gzip.compress(json.dumps({"score": 0.5}).encode())
        return web.Response(body=body, headers={"Content-Encoding": "gzip"}, content_type="application/json")

    assert ask_once(handler)[0].score == 0.5


def test_an_answer_that_comes_too_slowly_is_given_up():
    async def handler(request):
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                await response.write(b" ")
                await asyncio.sleep(0.05)
        return response

    assert "no whole answer within request_timeout_s (0.5 s)" in ask_once(handler, request_timeout_s=0.5)[0]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed_only_if_set_and_without_headers(monkeypatch, status):
    async def scenario():
        seen = []

        async def elsewhere(request):
            seen.append((request.method, (await request.json())["response"], request.headers.get("X-Tenant")))
            return web.json_response({"score": 1})

        async with service(elsewhere) as target:

            async def redirects(request):
                return web.Response(status=status, headers={"Location": f"{target}?secret=1"})

            async with service(redirects) as url:
                settings = {"retries": 2, "headers": {"X-Tenant": "ours"}}
                strict, lenient = source(url, **settings), source(url, follow_redirects=True, **settings)
                with pytest.raises(HttpSourceError) as caught:
                    await strict(ANSWER)
                assert seen == []
                found = await lenient(ANSWER)
                await close(strict, lenient)
        return str(caught.value), found, seen, url, target

    message, found, seen, url, target = asyncio.run(scenario())
    assert message == (
        f"gave up after 1 try at {url}: HTTP {status}, a redirect to {target}; name that address, or set "
        "follow_redirects = true"
    )
    assert seen == [("POST", "yes", None)]
    assert found == RawScore(1.0, f"{url}, redirected to {target}")


def test_redirects_in_a_circle_end():
    async def handler(request):
        return web.Response(status=307, headers={"Location": "/score"})

    assert "more than 5 redirects" in ask_once(handler, follow_redirects=True)[0]


@pytest.mark.parametrize(
    ("status", "tries"), [(400, 1), (401, 1), (404, 1), (422, 1), (408, 3), (425, 3), (429, 3), (503, 3)]
)
def test_a_request_that_is_refused_for_good_is_not_tried_again(status, tries):
    seen = []

    async def handler(request):
        seen.append(1)
        return web.Response(status=status, text="no such \x1b[2J model\n\n" + "x" * 1000)

    found, _ = ask_once(handler, retries=2)
    assert len(seen) == tries
    assert f"HTTP {status}: no such \\x1b[2J model xxx" in found
    assert len(found) < 400


def test_an_address_that_refuses_for_good_is_left_for_another():
    async def scenario():
        async def missing(request):
            return web.Response(status=404)

        async def working(request):
            return web.json_response({"score": 1})

        async with service(missing) as one, service(working) as other:
            judge = source(one, other, retries=1)
            found = await judge(ANSWER)
            await close(judge)
        return found == RawScore(1.0, other)

    assert asyncio.run(scenario())


@pytest.fixture
def pauses(monkeypatch):
    """The pauses between tries, seconds. None is waited for."""
    found, real = [], asyncio.sleep

    async def sleep(seconds):
        found.append(seconds)
        await real(0)

    monkeypatch.setattr("actors.scoring.http_service.asyncio.sleep", sleep)
    return found


def test_retry_after_lengthens_the_pause_up_to_a_limit(pauses):
    waits = iter(["7", "0", "86400"])

    async def handler(request):
        return web.Response(status=429, headers={"Retry-After": next(waits)})

    found, _ = ask_once(handler, retries=9, backoff_s=0.25)
    assert [pause for pause in pauses if pause] == [pytest.approx(7, abs=1), 0.5]  # aiohttp's server sleeps for 0 s
    assert "gave up after 3 tries; the last one at" in found


def test_retry_after_of_one_address_does_not_delay_another(pauses):
    async def busy(request):
        return web.Response(status=429, headers={"Retry-After": "50"})

    async def broken(request):
        return web.Response(status=500)

    async def scenario():
        async with service(busy) as one, service(broken) as other:
            grader = source(one, other, retries=3, backoff_s=0.25)
            with pytest.raises(HttpSourceError):
                await grader(ANSWER)
            await close(grader)

    asyncio.run(scenario())
    # busy; broken after the usual pause; busy after its own pause; broken after the usual pause.
    assert [pause for pause in pauses if pause] == [0.25, pytest.approx(50, abs=2), 1.0]


@pytest.mark.parametrize(
    ("text", "seconds"), [("12", 12), ("", 0), ("soon", 0), ("-5", 0), ("Fri, 01 Jan 1999 00:00:00 GMT", 0)]
)
def test_retry_after_is_read_in_both_forms(text, seconds):
    assert retry_after(text) == seconds


def test_retry_after_may_be_a_date():
    assert 3000 < retry_after(format_datetime(datetime.now(UTC) + timedelta(hours=1))) < 3700


# Headers and keys


def test_keys_come_from_the_environment_and_are_in_no_message(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "s3cret-value")
    seen = []

    async def handler(request):
        seen.append((request.headers["Authorization"], request.headers["X-Tenant"]))
        return web.Response(status=401, text="wrong key s3cret-value")

    async def scenario():
        async with service(handler) as url:
            headers = {"Authorization": "Bearer env:JUDGE_KEY", "X-Tenant": "ours"}
            cfg = HttpSourceConfig(name="judge", urls=[url], headers=headers)
            secrets = read_secrets([cfg])
            assert "s3cret" not in repr(secrets) + repr(cfg)
            judge = HttpSource(cfg, pickle.loads(pickle.dumps(secrets)))
            with pytest.raises(HttpSourceError) as caught:
                await judge(ANSWER)
            await close(judge)
        return str(caught.value)

    message = asyncio.run(scenario())
    assert seen == [("Bearer s3cret-value", "ours")]
    assert message.endswith("HTTP 401: wrong key [JUDGE_KEY]")


def show_key(monkeypatch, handler, key: str) -> str:
    """The error of one request to the handler with this key."""
    monkeypatch.setenv("JUDGE_KEY", key)

    async def scenario():
        async with service(handler) as url:
            cfg = HttpSourceConfig(name="j", urls=[url], headers={"X-Api-Key": "env:JUDGE_KEY"}, retries=0)
            grader = HttpSource(cfg, read_secrets([cfg]))
            with pytest.raises(HttpSourceError) as caught:
                await grader(ANSWER)
            await close(grader)
        return str(caught.value)

    return asyncio.run(scenario())


@pytest.mark.parametrize("before", range(0, 200, 40))
def test_no_part_of_a_key_is_shown_where_a_message_is_cut(monkeypatch, before):
    key = "".join(f"<{number:02}>" for number in range(16))  # 64 characters

    async def failing(request):
        return web.Response(status=500, text="x" * before + key + "y" * 500)

    async def wrong(request):
        return web.json_response({"score": "x" * (before // 4) + key + "y" * 500})

    async def no_score(request):
        return web.json_response({"x" * before + key + "y" * 500: 1})

    for handler in (failing, wrong, no_score):
        shown = show_key(monkeypatch, handler, key)
        assert "<" not in shown
        assert "[JU" in shown


def test_a_key_is_found_where_it_is_escaped(monkeypatch):
    async def handler(request):
        return web.json_response({"score": "it's a\\b\"c"})

    assert show_key(monkeypatch, handler, 'a\\b"c').endswith(r"not 'it\'s [JUDGE_KEY]'")


@pytest.mark.parametrize("packed", [False, True])
def test_the_start_of_a_long_error_is_shown(packed):
    async def handler(request):
        body = b"out of memory " + b"trace " * 100_000
        headers = {"Content-Encoding": "gzip"} if packed else {}
        return web.Response(status=500, body=gzip.compress(body) if packed else body, headers=headers)

    assert "HTTP 500: out of memory trace trace" in ask_once(handler)[0]


def test_more_than_a_hundred_requests_overlap():
    async def scenario():
        arrived, everyone = 0, asyncio.Event()

        async def handler(request):
            nonlocal arrived
            arrived += 1
            if arrived == 120:
                everyone.set()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(everyone.wait(), 10)
            return web.json_response({"score": float(everyone.is_set())})

        async with service(handler) as url:
            grader = source(url, concurrency=120, retries=0, request_timeout_s=60)
            found = await asyncio.gather(*(grader(ANSWER) for _ in range(120)))
            await close(grader)
        return sum(score.score for score in found)

    assert asyncio.run(scenario()) == 120


@pytest.mark.parametrize(("value", "message"), [("", "is not set here; export"), ("a\nb", "that no header")])
def test_a_key_that_is_missing_or_no_header_is_refused(monkeypatch, value, message):
    monkeypatch.setenv("JUDGE_KEY", value)
    cfg = HttpSourceConfig(name="judge", urls=["http://h"], headers={"X-Api-Key": "env:JUDGE_KEY"})
    with pytest.raises(UserError, match=rf"reward source judge: headers.X-Api-Key.*JUDGE_KEY.*{message}"):
        read_secrets([cfg])


# Several answers a request


def test_several_answers_in_one_request_are_scored_in_order():
    async def scenario():
        sizes = []

        async def handler(request):
            answers = (await request.json())["answers"]
            sizes.append(len(answers))
            await asyncio.sleep(0.05)
            return web.json_response({"scores": [int(answer["prompt"]) for answer in answers], "model": "g"})

        async with service(handler) as url:
            judge = source(url, batch=4, concurrency=1)
            found = await asyncio.gather(*(judge(replace(ANSWER, prompt=str(n))) for n in range(10)))
            found.append(await judge(replace(ANSWER, prompt="10")))
            await close(judge)
        return found, sizes, url

    found, sizes, url = asyncio.run(scenario())
    assert found == [RawScore(float(n), f"g at {url}") for n in range(11)]
    assert sizes == [4, 4, 2, 1]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"scores": [1.0, 2.0]}, '"scores" must be a list of 1 numbers, not 2 of them'),
        ({"scores": 1.0}, '"scores" must be a list of 1 numbers, not a float'),
        ({"scores": ["1"]}, "\"scores\" must hold a number, not '1'"),
        ({"score": 1.0}, "the answer has no 'scores'; its keys are 'score'"),
    ],
)
def test_scores_of_another_form_are_a_failure(answer, message):
    assert message in ask_once(answers(**answer), batch=3)[0]


def test_token_ids_and_raw_text_are_sent_if_asked_for():
    seen = []

    async def handler(request):
        seen.append(await request.json())
        return web.json_response({"score": 1})

    answer = replace(ANSWER, prompt_ids=[1, 2], response_ids=[3], raw_response="yes</s>")

    async def scenario():
        async with service(handler) as url:
            judge = source(url, send_tokens=True)
            await judge(answer)
            await close(judge)

    asyncio.run(scenario())
    assert (seen[0]["prompt_ids"], seen[0]["response_ids"], seen[0]["raw_response"]) == ([1, 2], [3], "yes</s>")


def test_an_answer_must_be_utf8_with_or_without_byte_order_mark():
    def handler(body):
        async def handle(request):
            return web.Response(body=body, content_type="application/json")

        return handle

    assert "UnicodeDecodeError" in ask_once(handler(b'{"score": 1, "why": "\xed\xa0\x80"}'))[0]
    assert ask_once(handler(b'\xef\xbb\xbf{"score": 1}'))[0].score == 1.0
