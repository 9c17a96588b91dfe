"""An HTTP server on 127.0.0.1, at which the agents of one replica ask the model. Runs in each environment replica.

It has a thread and an event loop of its own, so it answers even while an agent blocks. Each episode has a key of its
own, and a request without the key of a running episode is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread

from aiohttp import web

from actors.environments.chat_answers import ChatAnswer
from actors.environments.chat_answers import completion as completion_of
from actors.environments.chat_answers import events as events_of
from actors.environments.chat_requests import MODEL, ChatRequest, RefusedError, RequestReader
from common.config.actors import SamplingConfig
from common.environment import Endpoint

Ask = Callable[[ChatRequest], "Future[ChatAnswer]"]  # called in the server's thread; must return at once
HOST = "127.0.0.1"
START_S, STOP_S = 30.0, 2.0  # time limits of the server's start and end
MOST_BYTES = 64 << 20  # of a request
_PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")


class EndpointServer:
    """Serves the chat completions of all episodes of a replica, one endpoint for each."""

    def __init__(self, sampling: SamplingConfig) -> None:
        """Starts the server on a free port."""
        self._reader = RequestReader(sampling)
        self._episodes: dict[str, Ask] = {}  # by key
        self._loop = asyncio.new_event_loop()
        Thread(target=self._loop.run_forever, name="endpoint", daemon=True).start()
        port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(START_S)
        self.base_url = f"http://{HOST}:{port}/v1"
        _without_proxy()

    def open(self, ask: Ask) -> Endpoint:
        """The endpoint of a new episode, whose requests go to `ask`. The future that it returns has the answer or a
        RefusedError. It is cancelled if the client goes away."""
        key = secrets.token_urlsafe(32)
        self._episodes[key] = ask
        return Endpoint(self.base_url, key, MODEL)

    def shut(self, endpoint: Endpoint) -> None:
        """Refuses all further requests of an episode."""
        self._episodes.pop(endpoint.api_key, None)

    def close(self) -> None:
        """Ends the server and its thread."""
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(STOP_S)
        self._loop.call_soon_threadsafe(self._loop.stop)

    async def _start(self) -> int:
        app = web.Application(client_max_size=MOST_BYTES)
        app.router.add_post("/v1/chat/completions", self._complete)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model}", self._models)
        app.router.add_route("*", "/{path:.*}", self._unknown)
        # Handlers of requests whose clients leave are cancelled, so that the model does not answer these requests.
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, HOST, 0).start()
        return int(self._runner.addresses[0][1])

    def _ask_of(self, request: web.Request) -> Ask:
        """Raises RefusedError for a key that no running episode has."""
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        ask = self._episodes.get(key.strip()) if scheme.lower() == "bearer" else None
        if ask is None:
            raise RefusedError(
                "the API key is not that of a running episode; use endpoint.api_key, and make no request after the "
                "agent has returned",
                status=401,
                code="invalid_api_key",
            )
        return ask

    async def _complete(self, request: web.Request) -> web.Response:
        try:
            ask = self._ask_of(request)
            asked = self._reader.read(await request.read())
            answer = await asyncio.wrap_future(ask(asked))
        except RefusedError as error:
            return web.json_response(error.body, status=error.status)
        except web.HTTPRequestEntityTooLarge:
            large = RefusedError(f"the request has more than {MOST_BYTES >> 20} MiB", status=413, code="too_large")
            return web.json_response(large.body, status=large.status)
        if asked.stream:
            body = events_of(answer, include_usage=asked.include_usage)
            return web.Response(body=body, content_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        return web.json_response(completion_of(answer))

    async def _models(self, request: web.Request) -> web.Response:
        try:
            self._ask_of(request)
            if (name := request.match_info.get("model", MODEL)) != MODEL:
                raise RefusedError(f"there is no model {name}; use {MODEL}", status=404, code="model_not_found")
        except RefusedError as error:
            return web.json_response(error.body, status=error.status)
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "ratchet"}
        alone = "model" in request.match_info
        return web.json_response(model if alone else {"object": "list", "data": [model]})

    async def _unknown(self, request: web.Request) -> web.Response:
        error = RefusedError(
            f"{request.method} {request.path} does not exist here; the endpoint has POST /v1/chat/completions and GET "
            "/v1/models",
            status=404,
            code="unknown_url",
        )
        return web.json_response(error.body, status=error.status)


def _without_proxy() -> None:
    """Keeps clients in this process from sending requests to 127.0.0.1 to a proxy that the environment names."""
    if any(os.environ.get(name) for name in _PROXIES):
        for name in ("no_proxy", "NO_PROXY"):
            hosts = [host for host in os.environ.get(name, "").split(",") if host]
            os.environ[name] = ",".join(dict.fromkeys([*hosts, HOST]))
