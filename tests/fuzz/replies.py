"""Replies of an HTTP reward service give the score in the reply, or a void with one message, after one request."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import re
import threading
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

from actors.scoring.reward import Reward
from common.config.actors import RewardConfig
from common.types import Score, Void
from tests.fakes import END, make_prompt, make_rollout
from tests.fuzz.data_files import byte_tokenizer
from tests.fuzz.judge import LIMIT_S, WrongAnswer, check_message
from tests.fuzz.mutate import ODD_TEXTS, json_text, mutate_bytes, mutate_text, mutate_tree, odd_value

RIGHT = {
    "one": {"score": 0.75, "model": "grader v1"},
    "batch": {"scores": [0.75], "model": "grader v1"},
    "judge": {"choices": [{"message": {"role": "assistant", "content": "It is fine. Score: 7"}}], "model": "judge v1"},
}
REQUEST_S = 0.2
STATUSES = ("204 No Content", "301 Moved", "302 Found", "308 Moved", "400 Bad", "401 No",
            "404 Gone", "418 I'm a teapot", "429 Slow", "500 Error", "503 Busy", "999 ?", "20 OK", "200")  # fmt: skip


class Service:
    """Answers every request with the bytes in `reply`, and counts the requests."""

    def __init__(self) -> None:
        self.reply = b""
        self.requests = 0
        self.stays_open = False
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(lambda loop, context: None)  # unclosed sessions end with this process
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._server = self.run(asyncio.start_server(self._answer, "127.0.0.1", 0))
        port = self._server.sockets[0].getsockname()[1]
        url, limits = f"http://127.0.0.1:{port}", {"retries": 0, "request_timeout_s": REQUEST_S}
        judge = {"judge_urls": [url], "judge_model": "judge", "template": "Rate {response}.", "score_range": [0, 10]}
        kinds = {"one": {"urls": [url]}, "batch": {"urls": [url], "batch": 4}, "judge": judge}
        self.rewards = {name: self.run(self._make({"name": "fuzz", **limits, **kind})) for name, kind in kinds.items()}

    async def _make(self, source: dict[str, Any]) -> Reward:
        return Reward("Reward(0)", RewardConfig.model_validate({"sources": [source]}), model=byte_tokenizer())

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(LIMIT_S)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError, TimeoutError):
            head = await reader.readuntil(b"\r\n\r\n")
            self.requests += 1
            length = next(
                (int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")), 0
            )
            await reader.readexactly(length)
            writer.write(self.reply)
            await writer.drain()
            if self.stays_open:
                await asyncio.wait_for(reader.read(1), 2 * REQUEST_S)
        writer.close()

    def close(self) -> None:
        self._server.close()

        async def end() -> None:
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self.run(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


def prepare(directory: Path) -> Service:
    return Service()


def close(shared: Service) -> None:
    shared.close()


def case(rng: Random, shared: Service, scratch: Path) -> None:
    kind = rng.choice([*RIGHT])
    body = make_body(rng, RIGHT[kind])
    shared.reply, shared.stays_open, shared.requests = make_reply(rng, body), rng.random() < 0.05, 0
    (scratch / "reply").write_bytes(shared.reply[:100_000])
    found = shared.run(shared.rewards[kind].score(make_rollout(make_prompt(0), [70, 71, END])))
    if shared.requests > 1:  # zero: the client used a connection that the service had closed
        raise WrongAnswer(f"{shared.requests} requests for one answer, without retries")
    if isinstance(found, Void):
        check_message(found.reason)
        if len(found.reason) > 2000:
            raise WrongAnswer(f"a reason of {len(found.reason)} characters: {found.reason[:300]!r} ...")
        return
    if not isinstance(found, Score) or not math.isfinite(found.total):
        raise WrongAnswer(f"neither a score nor a void: {found}")
    score = score_in(json.loads(body), kind)
    if isinstance(score, (bool, str)) or found.total != float(score):
        raise WrongAnswer(f"{found.total} is not the score in {body[:300]!r}")


def score_in(answer: Any, kind: str) -> Any:
    """The score in the service's answer."""
    if kind == "judge":
        return float(re.findall(r"[Ss]core[^\w-]{0,5}(-?\d+)", answer["choices"][0]["message"]["content"])[-1])
    return answer["score"] if kind == "one" else answer["scores"][0]


def make_body(rng: Random, right: dict[str, Any]) -> bytes:
    kind = rng.randrange(6)
    if kind == 0:
        return json.dumps(right).encode()
    if kind == 1:
        return json_text(rng, odd_value(rng, json_only=True)).encode("utf-8", "surrogatepass")
    if kind == 2:
        key = next(iter(right))
        value = odd_value(rng, json_only=True)
        value = value if key == "score" or rng.random() < 0.5 else [value]
        return json_text(rng, {**right, key: value}).encode("utf-8", "surrogatepass")
    if kind == 3:
        return mutate_text(rng, json.dumps(right, indent=1)).encode("utf-8", "surrogatepass")
    if kind == 4:
        return mutate_bytes(rng, json.dumps(right).encode())
    return json_text(rng, mutate_tree(rng, right, json_only=True)).encode("utf-8", "surrogatepass")


def packed(body: bytes) -> bytes:
    return gzip.compress(body, mtime=0)  # the same bytes at any time


def make_reply(rng: Random, body: bytes) -> bytes:
    """A reply as a server might send it, mostly well-formed."""
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    status = rng.choice(STATUSES) if rng.random() < 0.3 else "200 OK"
    if status.startswith("3") and rng.random() < 0.8:
        headers["Location"] = rng.choice(["/again", "http://127.0.0.1:9/", "//", "", "file:///etc/passwd"])
    change = rng.randrange(20)
    if change == 0:
        headers["Content-Type"] = rng.choice(
            ["text/html", "application/json; charset=utf-16", "x", "text/plain; charset=?"]
        )
    elif change == 1:
        headers["Content-Length"] = str(rng.choice([0, max(0, len(body) - 3), len(body) + 50, -1, "x", 2**70]))
    elif change == 2:
        del headers["Content-Length"]
        headers["Transfer-Encoding"] = "chunked"
        body = rng.choice([b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body), b"zz\r\n", b"5\r\nab", b"ffffffffff\r\nab"])
    elif change == 3:
        headers["Content-Encoding"] = rng.choice(["gzip", "deflate", "br", "x"])
        body = rng.choice([packed(body), body, packed(b" " * 3_000_000 + body)])
        headers["Content-Length"] = str(len(body))
    elif change == 4:
        headers["X-Long"] = "x" * rng.choice([100, 20_000])
    elif change == 5:
        body += b" " * 5_000_000
        headers["Content-Length"] = str(len(body))
    elif change == 6:
        headers[rng.choice(["Set-Cookie", "X Y", "", "\x00", "Connection"])] = rng.choice(ODD_TEXTS[:20])
    head = f"HTTP/1.1 {status}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
    reply = head.encode("utf-8", "surrogatepass") + body
    if rng.random() < 0.1:
        return mutate_bytes(rng, reply)
    return reply
