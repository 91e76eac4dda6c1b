"""The application: completions, chat completions, models, health and metrics.

`application(service, …)` is what a server runs (besa.serve.api.server), and what tests call.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from besa.serve.api.answers import (
    ChatCompletion,
    Completion,
    ErrorAnswer,
    Model,
    ModelList,
    to_json,
)
from besa.serve.api.errors import ApiError, ascii_only, invalid
from besa.serve.api.middleware import App, Gate, with_cors, with_request_ids
from besa.serve.api.replies import ChatReply, CompletionReply, Reply
from besa.serve.api.requests import ChatRequest, CompletionRequest
from besa.serve.api.service import Service, no_model
from besa.version import __version__

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer} for status in (400, 401, 404, 413, 415, 500, 503)
}


def application(service: Service, key: str | None = None, cors: bool = False) -> App:
    """The ASGI application, with all that is around it.

    Args:
        key: what clients have to show; None lets everyone in.
        cors: whether pages of other origins may ask.
    """
    app: App = Gate(routes(service), key)
    if cors:
        app = with_cors(app)
    return with_request_ids(app, service.metrics)


def routes(service: Service) -> FastAPI:
    """The endpoints alone."""
    app = FastAPI(title="besa", version=__version__, docs_url=None, redoc_url=None)
    model = Model(id=service.name, created=int(time.time()), max_model_len=service.backend.longest)
    _answer_errors(app)

    async def completions(request: CompletionRequest) -> Response:
        return await _answer(CompletionReply(service, request), request.stream)

    async def chat_completions(request: ChatRequest) -> Response:
        return await _answer(ChatReply(service, request), request.stream)

    async def models() -> ModelList:
        return ModelList(data=[model])

    async def one_model(name: str) -> Model:
        if name != service.name:
            raise no_model(name, service.name)
        return model

    async def health() -> JSONResponse:
        failed = service.backend.failed
        return JSONResponse({"status": failed or "ok"}, 200 if failed is None else 503)

    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    for path, endpoint, answer in (
        ("/v1/completions", completions, Completion),
        ("/v1/chat/completions", chat_completions, ChatCompletion),
    ):
        app.add_api_route(
            path, endpoint, methods=["POST"], response_model=answer, responses=_ERRORS
        )
    app.add_api_route("/v1/models", models, responses=_ERRORS)
    app.add_api_route("/v1/models/{name:path}", one_model, responses=_ERRORS)
    app.add_api_route("/health", health, methods=["GET", "HEAD"], include_in_schema=False)
    app.add_api_route("/metrics", metrics, include_in_schema=False)
    return app


async def _answer(reply: Reply[Any], stream: bool | None) -> Response:
    if stream:
        return StreamingResponse(
            reply.events(),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
    return Response(to_json(await reply.collected()), media_type="application/json")


def _answer_errors(app: FastAPI) -> None:
    """Has every error worded as OpenAI's API does."""

    async def ours(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body, error.status)

    async def not_valid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        found = invalid([{**one, "loc": one["loc"][1:]} for one in error.errors()])  # less "body"
        return JSONResponse(found.body, found.status)

    async def starlettes(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        found = _worded(error.status_code, request, _paths(app), error.headers or {})
        return JSONResponse(found.body, found.status, headers=error.headers)

    async def unforeseen(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(ApiError(500, f"{type(error).__name__} in the server").body, 500)

    app.add_exception_handler(ApiError, ours)
    app.add_exception_handler(RequestValidationError, not_valid)
    app.add_exception_handler(HTTPException, starlettes)
    app.add_exception_handler(Exception, unforeseen)


def _worded(
    status: int, request: Request, paths: list[str], headers: Mapping[str, str]
) -> ApiError:
    path = ascii_only(request.url.path)
    if status == 404:
        return ApiError(404, f"there is no {path} here, only {', '.join(paths)}")
    if status == 405:
        allowed = headers.get("allow") or headers.get("Allow") or "another method"
        return ApiError(405, f"{path} does not take {request.method}: use {allowed}")
    return ApiError(status, "the body is no JSON" if status == 400 else "the request failed")


def _paths(app: FastAPI) -> list[str]:
    return sorted({route.path_format for route in app.routes if hasattr(route, "path_format")})
