"""A reward source behind HTTP: bounded concurrency, timeouts, retries with backoff, least-loaded among several URLs."""

from __future__ import annotations

import asyncio

import aiohttp

from common.config import HttpSourceConfig
from common.types import Raw, RewardInput

_SENT = ("prompt", "response", "response_tokens", "finish_reason", "fields", "messages")


class HttpSourceError(RuntimeError):
    """Every try failed; the message holds the last failure."""


class HttpSource:
    """POSTs a RewardInput as JSON; the answer is `{"score": number}`, and anything else, or none in time, a failure.

    The origin of a score is the address, with the `model` that the answer may name.
    """

    def __init__(self, cfg: HttpSourceConfig) -> None:
        self._cfg = cfg
        self._outstanding = dict.fromkeys(cfg.urls, 0)
        self._slots = asyncio.Semaphore(cfg.concurrency)
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, answer: RewardInput) -> Raw:
        """The service's score. Raises HttpSourceError after `retries` further tries, each at the least loaded URL that
        this answer has not failed at yet."""
        failed: list[str] = []
        async with self._slots:
            for attempt in range(self._cfg.retries + 1):
                if attempt:
                    await asyncio.sleep(self._cfg.backoff_s * 2 ** (attempt - 1))
                url = min(self._outstanding, key=lambda url: (failed.count(url), self._outstanding[url]))
                self._outstanding[url] += 1
                try:
                    return await self._post(url, answer)
                except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError, AttributeError) as error:
                    failed.append(url)
                    last = f"{url}: {type(error).__name__}: {error}"
                finally:
                    self._outstanding[url] -= 1
        raise HttpSourceError(f"gave up after {len(failed)} tries; the last one at {last}")

    async def _post(self, url: str, answer: RewardInput) -> Raw:
        if self._session is None:  # made on the loop that uses it
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self._cfg.request_timeout_s))
        async with self._session.post(url, json={key: getattr(answer, key) for key in _SENT}) as response:
            response.raise_for_status()
            found = await response.json()
            return Raw(float(found["score"]), f"{found['model']} at {url}" if found.get("model") else url)
