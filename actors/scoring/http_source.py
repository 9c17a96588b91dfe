"""An HTTP service as a reward source: sends answers as JSON, one or several per request, and gets scores back. Runs in
each reward replica."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from actors.scoring.call_queue import CallQueue, Waiting
from actors.scoring.http_service import AnswerError, HttpService
from actors.scoring.secrets import Secrets
from common.config.sources import HttpSourceConfig
from common.futures import settle
from common.types import RawScore, RewardInput
from common.user_code.results import FLOAT32_MAX

MODEL_CHARS = 200
_SENT = ("prompt", "response", "response_tokens", "finish_reason", "fields", "messages")
_TOKENS = ("prompt_ids", "response_ids", "raw_response")


class HttpSource:
    """POSTs a RewardInput as JSON; the service answers `{"score": number}`. With `batch` it POSTs `{"answers": [...]}`
    and the service answers `{"scores": [...]}`. Anything else, or no answer in time, is a failure. The origin of a
    score is the address, with the model's name if the answer has one."""

    def __init__(self, cfg: HttpSourceConfig, secrets: Secrets | None = None) -> None:
        self._service = HttpService(cfg, secrets or {})
        self._sent = (*_SENT, *_TOKENS) if cfg.send_tokens else _SENT
        self._queue: CallQueue[RawScore] | None = None
        if cfg.batch is not None:
            self._queue = CallQueue(self._send, batch=cfg.batch, concurrency=cfg.concurrency)

    async def __call__(self, answer: RewardInput) -> RawScore:
        """The service's score. Raises HttpSourceError."""
        if self._queue is not None:
            return await self._queue.submit(answer)
        (score, model), where = await self._service.ask(self._json(answer), _read_score)
        return RawScore(score, _origin(model, where))

    async def close(self) -> None:
        """Closes its connections."""
        await self._service.close()

    async def _send(self, waiting: Sequence[Waiting[RawScore]]) -> None:
        """Sends one request. If it fails, no answer is sent again alone: HttpService has retried already."""
        try:
            payload = {"answers": [self._json(answer) for answer, _ in waiting]}
            (scores, model), where = await self._service.ask(payload, lambda found: _read_scores(found, len(waiting)))
        except Exception as error:
            settle(waiting, [error] * len(waiting))
            return
        settle(waiting, [RawScore(score, _origin(model, where)) for score in scores])

    def _json(self, answer: RewardInput) -> dict[str, Any]:
        sent = {key: getattr(answer, key) for key in self._sent}
        return {**sent, "turns": answer.turns} if answer.turns else sent


def _origin(model: str, where: str) -> str:
    return f"{model} at {where}" if model else where


def _read_score(found: Any) -> tuple[float, str]:
    return read_number(read_entry(found, "score"), '"score"'), read_model_name(found)


def _read_scores(found: Any, count: int) -> tuple[list[float], str]:
    scores = read_entry(found, "scores")
    if not isinstance(scores, list) or len(scores) != count:
        what = f"{len(scores)} of them" if isinstance(scores, list) else f"a {type(scores).__name__}"
        raise AnswerError(f'"scores" must be a list of {count} numbers, not {what}')
    return [read_number(score, '"scores"') for score in scores], read_model_name(found)


def read_entry(found: Any, key: str) -> Any:
    """The value under a key of a JSON object. Raises AnswerError that shows what the service sent instead."""
    if not isinstance(found, Mapping):
        raise AnswerError(f"the answer must be a JSON object with {key!r}, not ", shown=repr(found))
    if key not in found:
        keys = ", ".join(repr(name) for name in list(found)[:10]) or "none"
        raise AnswerError(f"the answer has no {key!r}; its keys are ", shown=keys, limit=400)
    return found[key]


def read_number(value: Any, what: str) -> float:
    """A score from JSON as a float. Raises AnswerError for text, true, false, NaN and numbers beyond float32."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise AnswerError(f"{what} must hold a number, not ", shown=repr(value))
    if not abs(value) <= FLOAT32_MAX:  # NaN, which Python's JSON reads, is refused here too
        raise AnswerError(f"{what} must hold a number that float32 holds, not ", shown=str(value), limit=40)
    return float(value)


def read_model_name(found: Mapping[str, Any]) -> str:
    """The model that the answer names, for the journal; "" if it names none. Raises AnswerError if the name is no short
    printable text."""
    model = found.get("model")
    if model is None:
        return ""
    if not isinstance(model, str) or len(model) > MODEL_CHARS or not model.isprintable():
        raise AnswerError(f'"model" must be printable text of at most {MODEL_CHARS} characters')
    return model
