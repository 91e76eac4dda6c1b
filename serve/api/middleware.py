"""What an HTTP server needs around the endpoints: keys, limits, and clients that go away.

>>> async def application(scope, receive, send):
...     await respond(send, 200, {"status": "ok"})
>>> async def get(path):
...     sent = []
...     async def send(message):
...         sent.append(message)
...     scope = {"type": "http", "method": "GET", "path": path, "headers": []}
...     await Gate(application, key="secret")(scope, None, send)
...     return sent[0]["status"]
>>> asyncio.run(get("/v1/models"))
401

Pure ASGI, because the middleware of Starlette reads no disconnect while an answer is computed. A
client that hangs up cancels its request, so that its place in the queue is free for the next.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.middleware.cors import CORSMiddleware

from besa.serve.api.errors import ApiError
from besa.serve.api.metrics import Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

REQUEST_ID = "x-request-id"

# No prompt for a model that fits on one machine is longer.
_MOST_BYTES = 32 << 20

_PATHS = ("/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")

_log = logging.getLogger("besa.serve.access")


class Gate:
    """Lets those requests through to `app` that are allowed, and cancels those of nobody.

    Args:
        app: the endpoints.
        key: what clients have to show; None lets everyone in. /health is open to all.
    """

    def __init__(self, app: App, key: str | None) -> None:
        self.app, self.key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["path"] = scope["path"].rstrip("/") or "/"
        if (refusal := self._refusal(scope)) is not None:
            await respond(send, refusal.status, refusal.body)
        else:
            await self._forward(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        open_to_all = scope["path"] == "/health" or self.key is None
        if not open_to_all and not self._shows_key(headers.get(b"authorization", b"")):
            return ApiError(401, "the API key is missing or wrong", None, "invalid_api_key")
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").decode("latin-1")
            if kind.partition(";")[0].strip().lower() != "application/json":
                given = f"not {kind[:60]!a}" if kind else "which is missing"
                return ApiError(415, f"the Content-Type must be application/json, {given}")
        return None

    def _shows_key(self, header: bytes) -> bool:
        assert self.key is not None
        scheme, _, shown = header.partition(b" ")
        return scheme.lower() == b"bearer" and secrets.compare_digest(shown, self.key.encode())

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > _MOST_BYTES:
                large = ApiError(413, f"a request has {_MOST_BYTES} bytes at most")
                await respond(send, large.status, large.body)
                return
            if not message.get("more_body"):
                break

        delivered = False
        disconnected = asyncio.Event()

        async def receive_again() -> Message:
            nonlocal delivered
            if not delivered:
                delivered = True
                return {"type": "http.request", "body": body, "more_body": False}
            await disconnected.wait()
            return {"type": "http.disconnect"}

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            disconnected.set()

        work = asyncio.ensure_future(self.app(scope, receive_again, send))
        watcher = asyncio.create_task(watch())
        await asyncio.wait((work, watcher), return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            watcher.cancel()
        else:
            work.cancel()
        await asyncio.gather(work, watcher, return_exceptions=True)
        if not work.cancelled() and (error := work.exception()) is not None:
            raise error


def with_cors(app: App) -> App:
    """Pages of every origin may ask, and read whatever the answer is."""
    wrapped: App = CORSMiddleware(
        app,
        allow_origins=["*"],
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=[REQUEST_ID],
    )
    return wrapped


def with_request_ids(app: App, metrics: Metrics) -> App:
    """Every answer has an `x-request-id`, the client's or one of ours; it is counted and logged.

    The log has no prompts and no keys.
    """

    async def identified(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        name = _request_id(dict(scope["headers"]).get(REQUEST_ID.encode(), b""))
        status, started = 499, time.perf_counter()  # as nginx has it, for a client that went away

        async def send_identified(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (REQUEST_ID.encode(), name.encode())]
            await send(message)

        try:
            await app(scope, receive, send_identified)
        finally:
            path = _shown(scope["path"])
            metrics.answered(path, status)
            seconds = time.perf_counter() - started
            _log.info("%s %s %d %.3f s %s", scope["method"], path, status, seconds, name)

    return identified


def _shown(path: str) -> str:
    """A path for logs and metrics: clients could make up any number of others."""
    if path.startswith("/v1/models/"):
        return "/v1/models/{name}"
    return path if path in _PATHS else "other"


def _request_id(given: bytes) -> str:
    return given.decode() if re.fullmatch(rb"[!-~]{1,128}", given) else uuid.uuid4().hex


async def respond(send: Send, status: int, content: object) -> None:
    """Sends JSON, whole."""
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
