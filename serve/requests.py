"""Requests to besa's servers: refused where they cannot be answered, in OpenAI's words.

>>> check({"prompt": "Once", "max_tokens": 8, "n": 1})
>>> check({"prompt": "Once", "n": 2})
Traceback (most recent call last):
fastapi.exceptions.HTTPException: 400: n=2 is not supported by this server
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from besa.serve.middleware import problem

# Fields that change the answer and that neither engine heeds, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
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


def check(body: dict[str, Any], unsupported: Mapping[str, tuple[Any, ...]] | None = None) -> None:
    """Raises an HTTPException for what cannot be answered as it was asked.

    Args:
        body: the request; its `stop` becomes a list of strings.
        unsupported: further fields that the engine does not heed, as `_UNSUPPORTED`.
    """
    for field, harmless in {**_UNSUPPORTED, **(unsupported or {})}.items():
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
