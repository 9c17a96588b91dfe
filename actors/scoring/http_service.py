"""Sends requests to the HTTP service of a reward source: limits their number, time and size, retries them, and gives a
reason for every failure. Runs in each reward replica."""

from __future__ import annotations

import asyncio
import json
import math
import zlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import aiohttp
from yarl import URL

from actors.scoring.secrets import Secrets, request_headers, without_secrets
from common.config.sources import ServiceConfig
from common.plain_text import one_line

LONGEST_PAUSE_S = 60.0  # a request is not repeated at an address that asks for a longer one
REDIRECTS = 5
ERROR_BYTES = 16 << 10  # of a failed answer's body are read, after decompression
SHOWN_CHARS = 200  # of an address or of a failed answer's body, in a message
_TEMPORARY = (408, 425, 429)  # the only 4xx after which another try may succeed

Found = TypeVar("Found")


class HttpSourceError(RuntimeError):
    """Every try failed; the message holds the last failure."""


class AnswerError(ValueError):
    """A service's answer does not have the right form. `shown`: text from the service that ends the message. It is cut
    to `limit` characters only after keys are removed, because a part of a key would no longer be found."""

    def __init__(self, what: str, *, shown: str = "", limit: int = 80) -> None:
        super().__init__(what)
        self._what, self._shown, self._limit = what, shown, limit

    def message(self, secrets: Secrets) -> str:
        """The whole message, without keys."""
        return self._what + one_line(without_secrets(self._shown, secrets), self._limit)


class _Refused(Exception):
    """The service refused the request. `for_good`: another try at the same address would fail too. `pause_s`: the pause
    that the service asks for before another try, seconds."""

    def __init__(self, what: str, *, for_good: bool = False, pause_s: float = 0.0) -> None:
        super().__init__(what)
        self.for_good, self.pause_s = for_good, pause_s


class HttpService:
    """The addresses of one service. A request goes to the address where it has failed least often, and among these to
    the one with the fewest outstanding requests."""

    def __init__(self, cfg: ServiceConfig, secrets: Secrets, *, path: str = "") -> None:
        """`path` is added to every address."""
        self._cfg = cfg
        self._secrets = secrets
        self._headers = {**request_headers(cfg.headers, secrets), "Accept-Encoding": "identity"}
        self._outstanding = dict.fromkeys((url.rstrip("/") + path if path else url for url in cfg.addresses), 0)
        self._slots = asyncio.Semaphore(cfg.concurrency)
        self._session: aiohttp.ClientSession | None = None

    async def ask(self, payload: Mapping[str, Any], read: Callable[[Any], Found]) -> tuple[Found, str]:
        """The JSON answer as `read` returns it, and the address that gave it. `read` raises AnswerError for an answer
        that cannot be used. Raises HttpSourceError when the first try and all retries have failed, or when a retry
        would fail at every address."""
        failed: list[str] = []
        hopeless: set[str] = set()
        ready: dict[str, float] = {}  # by address that asked for a pause: the loop's time when the pause is over
        clock, last = asyncio.get_running_loop().time, ""
        async with self._slots:
            for attempt in range(self._cfg.retries + 1):
                left = [url for url in self._outstanding if url not in hopeless]
                url = min(left, key=lambda url: (failed.count(url), self._outstanding[url]))
                if attempt:
                    pause_s = ready.get(url, 0.0) - clock()
                    await asyncio.sleep(max(self._cfg.backoff_s * 2 ** (attempt - 1), pause_s))
                self._outstanding[url] += 1
                try:
                    found, where = await self._post(url, payload)
                    return read(found), where
                except _Refused as refused:
                    last = str(refused)
                    ready[url] = clock() + refused.pause_s
                    if refused.for_good or refused.pause_s > LONGEST_PAUSE_S:
                        hopeless.add(url)
                except TimeoutError:
                    last = f"no whole answer within request_timeout_s ({self._cfg.request_timeout_s:g} s)"
                except AnswerError as error:
                    last = error.message(self._secrets)
                except (aiohttp.ClientError, ValueError, RecursionError, OSError) as error:
                    last = f"{type(error).__name__}: {error}"
                finally:
                    self._outstanding[url] -= 1
                failed.append(url)
                last = f"{self._shown(url)}: {one_line(without_secrets(last, self._secrets))}"
                if len(hopeless) == len(self._outstanding):
                    break
        tries = "1 try" if len(failed) == 1 else f"{len(failed)} tries; the last one"
        raise HttpSourceError(f"gave up after {tries} at {last}")

    async def close(self) -> None:
        """Closes its connections."""
        if self._session is not None:
            await self._session.close()

    async def _post(self, url: str, payload: Mapping[str, Any]) -> tuple[Any, str]:
        if self._session is None:  # made here, because a session belongs to one event loop
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=self._cfg.request_timeout_s),
                connector=aiohttp.TCPConnector(limit=0),  # the setting `concurrency` limits requests
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        target, where = URL(url), self._shown(url)
        async with asyncio.timeout(self._cfg.request_timeout_s):  # for all redirects together
            for _ in range(REDIRECTS + 1):
                headers = self._headers if target.origin() == URL(url).origin() else {}
                async with self._session.post(target, json=payload, headers=headers, allow_redirects=False) as response:
                    if (moved := self._redirect(response)) is None:
                        return json.loads((await self._body(response)).decode("utf-8-sig")), where
                target = target.join(moved)
                where = f"{self._shown(url)}, redirected to {self._shown(str(target))}"
        raise _Refused(f"more than {REDIRECTS} redirects", for_good=True)

    def _redirect(self, response: aiohttp.ClientResponse) -> URL | None:
        if response.status not in (301, 302, 303, 307, 308):
            return None
        to = response.headers.get("Location", "")
        if not self._cfg.follow_redirects:
            raise _Refused(
                f"HTTP {response.status}, a redirect to {self._shown(to)}; name that address, or set "
                "follow_redirects = true",
                for_good=True,
            )
        moved = URL(to)
        if moved.is_absolute() and moved.scheme not in ("http", "https"):
            raise _Refused(f"HTTP {response.status}, a redirect to {self._shown(to)}, which is not http", for_good=True)
        return moved

    def _shown(self, url: str) -> str:
        return shown(without_secrets(url, self._secrets))

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        """The whole body, decompressed. Raises _Refused unless the status is 2xx."""
        if response.status // 100 == 2:
            return await read_body(response, self._cfg.max_answer_kib << 10)
        try:
            text = (await read_start(response, ERROR_BYTES)).decode(errors="replace")
        except (AnswerError, aiohttp.ClientError):
            text = ""
        said = f": {one_line(without_secrets(text, self._secrets), SHOWN_CHARS)}" if text.strip() else ""
        raise _Refused(
            f"HTTP {response.status}{said}",
            for_good=response.status // 100 == 4 and response.status not in _TEMPORARY,
            pause_s=retry_after(response.headers.get("Retry-After", "")),
        )


async def read_body(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The decompressed body. Raises AnswerError if it has more than `limit` bytes, without decompressing more."""
    body = await read_start(response, limit + 1)
    if len(body) > limit:
        raise AnswerError(f"the answer is longer than max_answer_kib ({limit >> 10})")
    return body


async def read_start(response: aiohttp.ClientResponse, count: int) -> bytes:
    """The first `count` bytes of the decompressed body, or all of it if it is shorter. Raises AnswerError for a body
    that cannot be decompressed."""
    coding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if coding not in ("identity", "", "gzip", "deflate"):
        raise AnswerError("the request did not allow this compression of the answer: ", shown=coding, limit=40)
    # With 47, zlib detects by itself which of the two formats this is.
    decompressor = zlib.decompressobj(wbits=47) if coding in ("gzip", "deflate") else None
    body = b""
    async for part in response.content.iter_chunked(64 << 10):
        try:
            body += part if decompressor is None else decompressor.decompress(part, count - len(body))
        except zlib.error as error:
            raise AnswerError(f"the answer cannot be decompressed ({error})") from None
        if len(body) >= count:  # checked here, because decompress with a limit of 0 has no limit
            break
    return body[:count]


def retry_after(text: str) -> float:
    """Seconds in a Retry-After header, which has a number or a date; 0 for anything else."""
    try:
        seconds = (
            float(text) if text.strip().isdigit() else (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
        )
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else math.inf


def shown(url: str) -> str:
    """The address without user, password and query, which may be secrets."""
    try:
        parts = urlsplit(url)
        return one_line(urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", "")), SHOWN_CHARS)
    except ValueError:
        return "an address that cannot be read"
