"""A reward source behind HTTP: answers go out as JSON, one or several a request, and scores come back. Runs in each
reward process."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from actors.scoring.http_service import AnswerError, HttpService
from actors.scoring.secrets import Secrets
from common.config.sources import HttpSourceConfig
from common.model.batcher import settle
from common.plain_text import one_line
from common.types import Raw, RewardInput
from common.user_code.calls import LARGEST

MODEL_CHARS = 200
_SENT = ("prompt", "response", "response_tokens", "finish_reason", "fields", "messages")
_TOKENS = ("prompt_ids", "response_ids", "raw_response")


class HttpSource:
    """POSTs a RewardInput as JSON; the answer is `{"score": number}`. With `batch`, `{"answers": [...]}` is answered by
    `{"scores": [...]}`. Anything else, or nothing in time, is a failure. The origin of a score is the address, with the
    `model` that the answer may name."""

    def __init__(self, cfg: HttpSourceConfig, secrets: Secrets | None = None) -> None:
        self._service = HttpService(cfg, secrets or {})
        self._sent = (*_SENT, *_TOKENS) if cfg.send_tokens else _SENT
        self._batch = cfg.batch
        self._most = cfg.concurrency
        self._waiting: deque[tuple[RewardInput, asyncio.Future[Raw]]] = deque()
        self._senders: set[asyncio.Task[None]] = set()  # those that will look at what waits once more

    async def __call__(self, answer: RewardInput) -> Raw:
        """The service's score. Raises HttpSourceError."""
        if self._batch is None:
            (score, model), where = await self._service.ask(self._json(answer), _one_score)
            return Raw(score, _origin(model, where))
        future: asyncio.Future[Raw] = asyncio.get_running_loop().create_future()
        self._waiting.append((answer, future))
        if len(self._senders) < self._most:
            self._senders.add(asyncio.create_task(self._send_while_any_waits(self._batch)))
        return await future

    async def close(self) -> None:
        await self._service.close()

    async def _send_while_any_waits(self, batch: int) -> None:
        """Ends when nothing waits, and says so itself, since `__call__` then begins another one."""
        while self._waiting:
            count = min(batch, len(self._waiting))
            taken = [self._waiting.popleft() for _ in range(count)]
            wanted = [(answer, future) for answer, future in taken if not future.done()]
            if wanted:
                await self._send(wanted)
        task = asyncio.current_task()
        assert task is not None
        self._senders.remove(task)

    async def _send(self, wanted: Sequence[tuple[RewardInput, asyncio.Future[Raw]]]) -> None:
        """One request. Its failure is that of every answer in it: a service has been asked several times by then."""
        try:
            payload = {"answers": [self._json(answer) for answer, _ in wanted]}
            (scores, model), where = await self._service.ask(payload, lambda found: _scores(found, len(wanted)))
        except Exception as error:
            settle(wanted, [error] * len(wanted))
            return
        settle(wanted, [Raw(score, _origin(model, where)) for score in scores])

    def _json(self, answer: RewardInput) -> dict[str, Any]:
        return {key: getattr(answer, key) for key in self._sent}


def _origin(model: str, where: str) -> str:
    return f"{model} at {where}" if model else where


def _one_score(found: Any) -> tuple[float, str]:
    return number(entry(found, "score"), '"score"'), model_name(found)


def _scores(found: Any, count: int) -> tuple[list[float], str]:
    scores = entry(found, "scores")
    if not isinstance(scores, list) or len(scores) != count:
        what = f"{len(scores)} of them" if isinstance(scores, list) else f"a {type(scores).__name__}"
        raise AnswerError(f'"scores" must be a list of {count} numbers, not {what}')
    return [number(score, '"scores"') for score in scores], model_name(found)


def entry(found: Any, key: str) -> Any:
    """A JSON object's entry. Raises AnswerError that says what came instead."""
    if not isinstance(found, Mapping):
        raise AnswerError(f"the answer must be a JSON object with {key!r}, not {one_line(repr(found), 80)}")
    if key not in found:
        keys = ", ".join(repr(one_line(name, 40)) for name in list(found)[:10]) or "none"
        raise AnswerError(f"the answer has no {key!r}; its keys are {keys}")
    return found[key]


def number(value: Any, what: str) -> float:
    """A score of JSON: a number, and neither text nor true or false."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise AnswerError(f"{what} must hold a number, not {one_line(repr(value), 80)}")
    if not abs(value) <= LARGEST:  # also NaN, which Python's JSON reads
        raise AnswerError(f"{what} must hold a number that float32 holds, not {one_line(str(value), 40)}")
    return float(value)


def model_name(found: Mapping[str, Any]) -> str:
    """What the answer says of who gave it: short text for the journal, or nothing."""
    model = found.get("model")
    if model is None:
        return ""
    if not isinstance(model, str) or len(model) > MODEL_CHARS or not model.isprintable():
        raise AnswerError(f'"model" must be printable text of at most {MODEL_CHARS} characters')
    return model
