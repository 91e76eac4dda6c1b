"""Requests to transformers' server: checked, refused in OpenAI's words, ended as clients expect.

In the place of transformers' two handlers; `answer_errors` words what goes wrong before them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler

from besa.serve.middleware import problem
from besa.serve.stream import first_stop

# What changes the answer, and transformers ignores: refused, but for what is done anyway.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
}

_MOST_STOPS = 16

# The request that is being answered.
_asked: ContextVar[dict[str, Any]] = ContextVar("asked")


class _Checked:
    """What the two handlers have in common; in front of either in the order of inheritance."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        check(body)
        _asked.set(dict(body))
        body.pop("ignore_eos", None)  # which transformers does not know
        try:
            response = await super().handle_request(body, request_id)  # type: ignore[misc]
        except HTTPException:
            raise
        # What transformers makes of fields that are missing, or of other types.
        except (KeyError, TypeError, ValueError, AttributeError, TemplateError) as error:
            what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise HTTPException(400, what) from error
        if body.get("stream"):
            response.body_iterator = _to_the_end(response.body_iterator)
        return response

    def _resolve_model(self, body: dict[str, Any]) -> Any:
        served = self.model_manager.force_model  # type: ignore[attr-defined]
        if body.get("model", served) != served:
            raise HTTPException(404, f"there is no model {body['model']}, only {served}")
        return super()._resolve_model(body)  # type: ignore[misc]

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        config = super()._build_generation_config(body, *args, **kwargs)  # type: ignore[misc]
        if body.get("temperature"):
            config.do_sample = True
        if config.top_k is None:
            config.top_k = 0  # `generate` would leave all but the 50 likeliest tokens out
        if body.get("max_completion_tokens") is not None:  # transformers 5.19 ignores it
            config.max_new_tokens = body["max_completion_tokens"]
        if body.get("logit_bias"):  # which transformers heeds in chats only
            config.sequence_bias = {(int(k),): float(v) for k, v in body["logit_bias"].items()}
        if _asked.get().get("ignore_eos"):  # load generators want answers of one length
            config.eos_token_id = -1
        config.seed = body.get("seed")
        return config


class CompletionRequests(_Checked, CompletionHandler):  # type: ignore[misc]
    """/v1/completions."""


class ChatRequests(_Checked, ChatCompletionHandler):  # type: ignore[misc]
    """/v1/chat/completions."""

    def _build_completion(
        self, request_id: str, content: str | None, *args: Any, **kwargs: Any
    ) -> Any:
        # Where a model's answers are parsed, that is done from the tokens, stop strings and all.
        content = content and content[: first_stop(content, _asked.get().get("stop") or [])]
        return super()._build_completion(request_id, content, *args, **kwargs)


def check(body: dict[str, Any]) -> None:
    """Raises an HTTPException for what cannot be answered as it was asked."""
    for field, harmless in _REFUSED.items():
        if body.get(field) is not None and body[field] not in harmless:
            raise HTTPException(400, f"{field}={body[field]!r} is not supported by this server")
    stops = body.get("stop")
    if stops is not None:
        listed = [stops] if isinstance(stops, str) else stops
        if not isinstance(listed, list) or not all(isinstance(s, str) and s for s in listed):
            raise HTTPException(400, "stop is a string or a list of strings, none of them empty")
        if len(listed) > _MOST_STOPS:
            raise HTTPException(400, f"stop has more than {_MOST_STOPS} strings")
        body["stop"] = listed or None
    for field in ("max_tokens", "max_completion_tokens"):
        most = body.get(field)
        if most is not None and (type(most) is not int or most < 1):
            raise HTTPException(400, f"{field} is a number of tokens, 1 or more")
    temperature, top_p = body.get("temperature"), body.get("top_p")
    if temperature is not None and not (_number(temperature) and 0 <= temperature <= 100):
        raise HTTPException(400, "temperature is a number from 0 to 100")
    if top_p is not None and not (_number(top_p) and 0 < top_p <= 1):
        raise HTTPException(400, "top_p is a number above 0, up to 1")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


async def _to_the_end(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    """The events of a stream, and the one that says that it is over."""
    async for chunk in chunks:
        yield chunk
    yield "data: [DONE]\n\n"


def answer_errors(app: FastAPI) -> None:
    """Has `app` word its errors as OpenAI's API does."""

    async def refused(_: Request, error: Exception) -> JSONResponse:
        status, words = getattr(error, "status_code", 500), str(getattr(error, "detail", error))
        return JSONResponse(problem(words, status), status)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        what = "; ".join(each["msg"] for each in error.errors())
        return JSONResponse(problem(f"the request is no JSON object: {what}", 400), 400)

    app.add_exception_handler(StarletteHTTPException, refused)
    app.add_exception_handler(RequestValidationError, invalid)
