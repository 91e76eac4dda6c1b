"""An OpenAI-compatible server for ONNX models, on ONNX Runtime GenAI.

    python -m besa.serve.engine onnx serve DIR --served-model-name tiny --port 8000

Completions and chat completions, streamed or not; keys, closed connections and closed endpoints as
in front of transformers' server (besa.serve.middleware), and the same fields refused
(besa.serve.requests). `ignore_eos` and `min_tokens` are understood besides, which load generators
ask for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from transformers import AutoTokenizer
from transformers.cli.serving.utils import _StreamError

from besa.serve.cpu import threads
from besa.serve.middleware import Middleware
from besa.serve.onnx.generation import GenerationRequest, GenerationThread
from besa.serve.requests import answer_errors, check
from besa.serve.stream import Stream

# Of the legacy API, where a request does not say it.
_MOST_TOKENS = 16

# Fields that change the answer and that GenAI does not heed, with the values that ask for nothing.
# It takes a seed only where it batches dynamically, which is on GPUs.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "seed": (),
    "suffix": ("",),
    "tools": ([],),
}


def run(arguments: list[str]) -> None:
    """Serves until a signal comes.

    Args:
        arguments: DIR, --served-model-name NAME, --host, --port, --log-level.
    """
    parser = argparse.ArgumentParser(prog="besa serve --engine onnx", allow_abbrev=False)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--served-model-name", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--threads", type=int, help="default: one for each core")
    args = parser.parse_args(arguments)
    generation = GenerationThread(args.directory, args.threads or threads())
    try:
        uvicorn.run(
            application(args.directory, args.served_model_name, generation),
            host=args.host,
            port=args.port,
            log_level=args.log_level,
            access_log=False,
            timeout_graceful_shutdown=int(os.environ.get("BESA_SHUTDOWN_TIMEOUT", "30")),
        )
    finally:
        generation.stop()


def application(directory: Path, name: str, generation: GenerationThread) -> Middleware:
    """The ASGI application."""
    app = FastAPI(openapi_url=None)
    answer_errors(app)
    api = _Api(AutoTokenizer.from_pretrained(directory), name, generation)

    async def health() -> JSONResponse:
        status = {"status": "ok"} if generation.failed is None else {"status": generation.failed}
        return JSONResponse(status, 200 if generation.failed is None else 503)

    async def completions(body: dict[str, Any]) -> Any:
        return await api.answer(body, chat=False)

    async def chat_completions(body: dict[str, Any]) -> Any:
        return await api.answer(body, chat=True)

    app.add_api_route("/health", health)
    app.add_api_route("/v1/completions", completions, methods=["POST"])
    app.add_api_route("/v1/chat/completions", chat_completions, methods=["POST"])
    return Middleware(app, os.environ.get("BESA_API_KEY") or None, name)


class _Api:
    """Requests into prompts, and streams of text into OpenAI's objects."""

    def __init__(self, tokenizer: Any, name: str, generation: GenerationThread) -> None:
        self.tokenizer, self.name, self.generation = tokenizer, name, generation

    async def answer(self, body: dict[str, Any], chat: bool) -> Any:
        check(body, _UNSUPPORTED)
        if body.get("model", self.name) != self.name:
            raise HTTPException(404, f"there is no model {body['model']}, only {self.name}")
        prompt = self._messages(body) if chat else self._prompt(body)
        asked = self._generation_request(body, prompt, chat)
        stream = Stream(self.tokenizer, body.get("stop") or [])
        answer = _Answer(self.name, chat, asked, stream)
        self.generation.start(asked, stream)
        if body.get("stream"):
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            return StreamingResponse(answer.events(usage), media_type="text/event-stream")
        try:
            return JSONResponse(await answer.whole())
        except asyncio.CancelledError:  # the client has gone
            stream.cancel()
            raise

    def _prompt(self, body: dict[str, Any]) -> list[int]:
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
            prompt = prompt[0]
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        size = len(self.tokenizer)
        if isinstance(prompt, list) and all(
            type(token) is int and 0 <= token < size for token in prompt
        ):
            return prompt
        raise HTTPException(400, "prompt is a text, or a list of the model's token numbers")

    def _messages(self, body: dict[str, Any]) -> list[int]:
        messages = body.get("messages")
        known = isinstance(messages, list) and all(
            isinstance(one, dict) and isinstance(one.get("role"), str) for one in messages
        )
        if not known or not messages:
            raise HTTPException(400, "messages is a list of objects with a role and a content")
        try:
            found = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True
            )
        except (ValueError, TypeError, KeyError, TemplateError) as error:
            raise HTTPException(400, str(error).splitlines()[0]) from error
        return list(found["input_ids"])

    def _generation_request(
        self, body: dict[str, Any], prompt: list[int], chat: bool
    ) -> GenerationRequest:
        longest = self.generation.longest
        if not prompt:
            raise HTTPException(400, "the prompt is empty")
        if len(prompt) >= longest:
            raise HTTPException(
                400,
                f"the prompt has {len(prompt)} tokens, and {longest} are there for it and its "
                "answer",
            )
        most = body.get("max_completion_tokens") or body.get("max_tokens")
        if most is None:
            most = longest if chat else _MOST_TOKENS
        most = min(most, longest - len(prompt))
        least = most if body.get("ignore_eos") else int(body.get("min_tokens") or 0)
        return GenerationRequest(
            prompt,
            most,
            min(least, most),
            temperature=_number(body, "temperature"),
            top_p=_number(body, "top_p"),
            top_k=_whole_number(body, "top_k"),
        )


def _number(body: dict[str, Any], field: str) -> float | None:
    value = body.get(field)
    return None if value is None else float(value)  # `check` has seen it


def _whole_number(body: dict[str, Any], field: str) -> int | None:
    value = body.get(field)
    if value is not None and (type(value) is not int or value < 0):
        raise HTTPException(400, f"{field} is a whole number, 0 or more")
    return value


class _Answer:
    """A stream of text as the API words it."""

    def __init__(self, name: str, chat: bool, asked: GenerationRequest, stream: Stream) -> None:
        self.chat, self.asked, self.stream = chat, asked, stream
        self.head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": name,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer in one."""
        parts = []
        while (item := await self.stream.queue.get()) is not None:
            if isinstance(item, _StreamError):
                raise HTTPException(500, item.msg)
            parts.append(item)
        text = "".join(parts)
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": self._finish_reason()}
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": [choice], "usage": self._usage()}

    async def events(self, usage: bool) -> AsyncIterator[str]:
        """The answer piece by piece, as server-sent events."""
        try:
            if self.chat:
                yield self._event({"delta": {"role": "assistant", "content": ""}})
            while (item := await self.stream.queue.get()) is not None:
                if isinstance(item, _StreamError):
                    error = {"message": item.msg, "type": "server_error", "code": 500}
                    yield f"data: {json.dumps({'error': error})}\n\n"
                    break
                yield self._event({"delta": {"content": item}} if self.chat else {"text": item})
            else:
                last: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
                yield self._event(last, self._finish_reason())
                if usage:
                    yield self._event(None)
            yield "data: [DONE]\n\n"
        finally:
            self.stream.cancel()  # of no effect on what has ended

    def _event(self, said: dict[str, Any] | None, finish_reason: str | None = None) -> str:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        chunk: dict[str, Any] = {**self.head, "object": kind}
        if said is None:
            chunk |= {"choices": [], "usage": self._usage()}
        else:
            chunk["choices"] = [
                {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}
            ]
        return f"data: {json.dumps(chunk)}\n\n"

    def _finish_reason(self) -> str:
        full = len(self.stream.tokens) >= self.asked.max_tokens
        return "length" if full and not self.stream.stopped else "stop"

    def _usage(self) -> dict[str, int]:
        prompt, new = len(self.asked.prompt), len(self.stream.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
