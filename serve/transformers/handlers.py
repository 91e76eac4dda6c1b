"""transformers' two handlers of requests, with reason clients of OpenAI's API expect.

They check a request first, heed fields that transformers ignores, and end a stream with `[DONE]`.
besa.serve.transformers.server puts them in the place of transformers' own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Any

from fastapi import HTTPException
from jinja2 import TemplateError
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler

from besa.serve.requests import check
from besa.serve.stream import first_stop

# Of the request that is being answered.
_body: ContextVar[dict[str, Any]] = ContextVar("asked")


class _Checked:
    """What the two handlers have in common; it comes before either in the order of inheritance."""

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        check(body)
        _body.set(dict(body))
        body.pop("ignore_eos", None)  # which transformers does not know
        try:
            response = await super().handle_request(body, request_id)  # type: ignore[misc]
        except HTTPException:
            raise
        # What transformers makes of fields that are missing, or of other types.
        except (KeyError, TypeError, ValueError, AttributeError, TemplateError) as error:
            reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise HTTPException(400, reason) from error
        if body.get("stream"):
            response.body_iterator = _with_done(response.body_iterator)
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
        if _body.get().get("ignore_eos"):  # load generators want answers of one length
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
        content = content and content[: first_stop(content, _body.get().get("stop") or [])]
        return super()._build_completion(request_id, content, *args, **kwargs)


async def _with_done(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    """The events of a stream, and the one that says that it is over."""
    async for chunk in chunks:
        yield chunk
    yield "data: [DONE]\n\n"
