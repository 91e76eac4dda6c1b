"""What an HTTP server needs around an engine's application: keys, limits, and clients that go away.

>>> async def application(scope, receive, send):
...     await respond(send, 200, {"status": "ok"})
>>> async def get(path):
...     sent = []
...     async def send(message):
...         sent.append(message)
...     scope = {"type": "http", "method": "GET", "path": path, "headers": []}
...     await Middleware(application, key="secret", model="tiny")(scope, None, send)
...     return sent[0]["status"]
>>> asyncio.run(get("/v1/models"))
401

Pure ASGI, because the middleware of Starlette reads no disconnect while an answer is computed. A
client that hangs up cancels its request, so that its place in the queue is free for the next.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# No prompt for a model that fits on one machine is longer.
_MOST_BYTES = 32 << 20

# transformers' other endpoints load other models, throw this one away, or are not for text.
_ENDPOINTS = ("/health", "/v1/models", "/v1/completions", "/v1/chat/completions")


class Middleware:
    """Lets those requests through to `app` that are allowed and that it can answer.

    Args:
        app: transformers' ASGI application.
        key: what clients have to show; None lets everyone in. /health is open to all.
        model: the one model that there is.
    """

    def __init__(self, app: App, key: str | None, model: str) -> None:
        self.app = app
        self.key = key
        self.models = {
            "object": "list",
            "data": [
                {"id": model, "object": "model", "created": int(time.time()), "owned_by": "besa"}
            ],
        }

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].rstrip("/")
        if path != "/health" and not self._is_authorized(scope):
            await respond(send, 401, problem("the API key is missing or wrong", 401))
        elif path not in _ENDPOINTS:
            served = ", ".join(_ENDPOINTS)
            await respond(send, 404, problem(f"there is no {path} here, only {served}", 404))
        elif path == "/v1/models" and scope["method"] == "GET":
            await respond(send, 200, self.models)
        else:
            await self._forward(scope, receive, send)

    def _is_authorized(self, scope: MutableMapping[str, Any]) -> bool:
        if self.key is None or scope["method"] == "OPTIONS":
            return True
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, shown = header.partition(b" ")
        return scheme.lower() == b"bearer" and secrets.compare_digest(shown, self.key.encode())

    async def _forward(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if len(body) > _MOST_BYTES:
                await respond(send, 413, problem(f"a request has {_MOST_BYTES} bytes at most", 413))
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


def problem(message: str, status: int) -> dict[str, Any]:
    """An error as OpenAI's API words it."""
    kind = {401: "authentication_error", 404: "not_found_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


async def respond(send: Send, status: int, content: object) -> None:
    """Sends JSON, whole."""
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
