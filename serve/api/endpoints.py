"""Completions and chat completions: a request becomes prompts, answers become OpenAI's objects."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from besa.serve.api.answers import (
    AnswerMessage,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    Completion,
    CompletionChoice,
    ToolCall,
    sse,
)
from besa.serve.api.backend import Backend, BackendError, GenerationRequest
from besa.serve.api.chat import Chat, Delta
from besa.serve.api.errors import ApiError
from besa.serve.api.fields import shortened, unsupported_by
from besa.serve.api.generation import Answer, pieces, several, usage_of
from besa.serve.api.metrics import Metrics
from besa.serve.api.requests import MOST_CHOICES, ChatRequest, CompletionRequest, Request
from besa.serve.api.text import AnswerText

R = TypeVar("R", bound=Request)
C = TypeVar("C", bound=Completion | ChatChunk)

# What a completion has if it does not say it, as OpenAI's.
_MOST_TOKENS = 16
# Fields that only say how chance goes: with temperature 0 they ask for nothing.
_OF_CHANCE = ("seed", "min_p")
# What a model's generation_config.json may say, as for vLLM.
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def defaults_of(directory: Path) -> dict[str, float]:
    """How the model's makers would have it sampled, where a request does not say it."""
    path = directory / "generation_config.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: found[name] for name in _DEFAULTS if found.get(name) is not None}


class Service:
    """What both endpoints answer with.

    Args:
        name: what clients call the model.
        defaults: of sampling, see `defaults_of`.
    """

    def __init__(
        self,
        backend: Backend,
        chat: Chat,
        name: str,
        defaults: Mapping[str, float],
        metrics: Metrics,
    ) -> None:
        self.backend, self.chat, self.name = backend, chat, name
        self.defaults, self.metrics = defaults, metrics
        self.tokenizer = chat.tokenizer

    def check(self, request: Request) -> None:
        """Raises an ApiError for what the engine cannot answer."""
        if self.backend.failed is not None:
            raise ApiError(503, f"the engine has failed: {self.backend.failed}")
        if request.model is not None and request.model != self.name:
            raise no_model(request.model, self.name)
        asked = request
        if self.sampling(request)["temperature"] == 0:
            asked = request.model_copy(update=dict.fromkeys(_OF_CHANCE))
        if (found := unsupported_by(self.backend.name, asked)) is not None:
            field, value = found
            raise ApiError(
                400,
                f"{field}={shortened(value)} is not supported by this server with --engine "
                f"{self.backend.name}: leave it out",
                field,
                "unsupported_parameter",
            )
        if any(not 0 <= token < self.backend.vocabulary for token in request.logit_bias):
            raise ApiError(400, "logit_bias must have tokens of the model", "logit_bias")

    def sampling(self, request: Request) -> dict[str, Any]:
        """What a request says of sampling, else the model's makers, else OpenAI's reference."""
        asked = {name: getattr(request, name) for name in _DEFAULTS}
        given = {name: value for name, value in asked.items() if value is not None}
        found = {"temperature": 1.0, **self.defaults, **given}
        found["top_k"] = min(max(found.get("top_k", 0), 0), self.backend.vocabulary)
        return found

    def generation(
        self,
        request: Request,
        prompt: list[int],
        most: int | None,
        field: str,
        default: int | None = None,
    ) -> GenerationRequest:
        """What the engine is asked for.

        Args:
            most: new tokens, by the request's `field`.
            default: as many of them as fit where the request does not say it; None for all.

        Raises:
            ApiError: the prompt does not fit.
        """
        room = self.backend.longest - len(prompt)
        if not prompt:
            raise ApiError(400, "the prompt is empty", "prompt")
        if room < 1:
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens, and {self.backend.longest} are there for it "
                "and its answer",
                "prompt",
                "context_length_exceeded",
            )
        if most is None:
            most = room if default is None else min(default, room)
        elif most > room:
            raise ApiError(
                400,
                f"{field} is {most}, and the context of {self.backend.longest} tokens has room for "
                f"{room} after the prompt",
                field,
                "context_length_exceeded",
            )
        least = most if request.ignore_eos else request.min_tokens or 0
        if least > most:
            raise ApiError(400, f"min_tokens is {least}, and {most} may come", "min_tokens")
        return GenerationRequest(
            prompt,
            most,
            least,
            **self.sampling(request),
            frequency_penalty=request.frequency_penalty or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            logit_bias=request.logit_bias,
            seed=request.seed,
        )

    def text(self, request: Request, generation: GenerationRequest, parsed: bool) -> AnswerText:
        """What turns tokens into text; a parser reads special tokens, too."""
        return AnswerText(
            self.tokenizer,
            generation.prompt,
            request.stop,
            self.backend.ends if generation.min_tokens < generation.max_tokens else (),
            generation.min_tokens,
            skip_special_tokens=request.skip_special_tokens is not False and not parsed,
        )


def no_model(asked: str, served: str) -> ApiError:
    """Another model than the one that is served."""
    shown = asked.encode("ascii", "backslashreplace").decode()[:200]
    return ApiError(404, f"there is no model {shown}, only {served}", "model", "model_not_found")


class Reply(ABC, Generic[R]):
    """The answers to one request, whole or in chunks.

    Raises:
        ApiError: there are none.
    """

    def __init__(self, service: Service, request: R) -> None:
        service.check(request)
        self.service, self.request, self.n = service, request, request.n or 1
        self.answers = self.make_answers()
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.name,
        }

    prefix: str

    @abstractmethod
    def make_answers(self) -> list[Answer]:
        """One for each prompt and each of `n`."""

    @abstractmethod
    def whole(self, deltas: list[Delta]) -> BaseModel:
        """The answers in one, from what came of each."""

    @abstractmethod
    def chunk(self, answer: Answer, delta: Delta) -> Completion | ChatChunk:
        """What comes of an answer, in a stream."""

    @abstractmethod
    def usage_chunk(self) -> BaseModel:
        """The last chunk, which has the usage alone."""

    def opening(self) -> Sequence[Completion | ChatChunk]:
        """The chunks before any token."""
        return ()

    async def collected(self) -> BaseModel:
        """The answers, once they are whole.

        Raises:
            ApiError: the engine failed.
        """
        whole = [Delta() for _ in self.answers]
        try:
            async with aclosing(pieces(self.answers, self.service.backend)) as found:
                async for answer, delta in found:
                    whole[answer.index] += delta
        except BackendError as error:
            raise ApiError(500, f"the engine failed: {error}") from error
        return self.whole(whole)

    async def events(self) -> AsyncGenerator[str]:
        """The answers as server-sent events."""
        try:
            for opening in self.opening():
                yield sse(self._with_usage(opening))
            async with aclosing(pieces(self.answers, self.service.backend)) as found:
                async for answer, delta in found:
                    if delta:
                        yield sse(self._with_usage(self.chunk(answer, delta)))
            if self._tells_usage:
                yield sse(self.usage_chunk())
        except BackendError as error:
            yield sse(ApiError(500, f"the engine failed: {error}").body)
        yield "data: [DONE]\n\n"

    @property
    def _tells_usage(self) -> bool:
        options = self.request.stream_options
        return options is not None and bool(options.include_usage)

    def _with_usage(self, chunk: C) -> C:
        """A chunk with the usage so far if that is asked for, and null if only the last has it."""
        options = self.request.stream_options
        if self._tells_usage:
            always = options is not None and options.continuous_usage_stats
            chunk.usage = usage_of(self.answers, self.n) if always else None
        return chunk


class CompletionReply(Reply[CompletionRequest]):
    """Answers to `POST /v1/completions`."""

    prefix = "cmpl"

    def make_answers(self) -> list[Answer]:
        request, service = self.request, self.service
        if len(request.prompt) * self.n > MOST_CHOICES:
            raise ApiError(400, f"a request has {MOST_CHOICES} answers at most", "prompt")
        answers: list[Answer] = []
        for given in request.prompt:
            prompt = self._tokens(given)
            echo = ""
            if request.echo:
                echo = given if isinstance(given, str) else service.tokenizer.decode(given)
            asked = service.generation(
                request, prompt, request.max_tokens, "max_tokens", _MOST_TOKENS
            )
            for one in several(asked, self.n):
                text = service.text(request, one, parsed=False)
                metrics = service.metrics.answer()
                answers.append(Answer(len(answers), one, text, metrics, echo=echo))
        return answers

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            special = self.request.add_special_tokens is not False
            return list(self.service.tokenizer(prompt, add_special_tokens=special)["input_ids"])
        if all(0 <= token < self.service.backend.vocabulary for token in prompt):
            return prompt
        raise ApiError(400, "prompt must have token numbers of the model", "prompt")

    def whole(self, deltas: list[Delta]) -> Completion:
        choices = [self._choice(a, d) for a, d in zip(self.answers, deltas, strict=True)]
        return self._completion(choices, usage=usage_of(self.answers, self.n))

    def chunk(self, answer: Answer, delta: Delta) -> Completion:
        return self._completion([self._choice(answer, delta)])

    def usage_chunk(self) -> Completion:
        return self._completion([], usage=usage_of(self.answers, self.n))

    def _completion(self, choices: list[CompletionChoice], **more: Any) -> Completion:
        return Completion(object="text_completion", choices=choices, **self.head, **more)

    def _choice(self, answer: Answer, delta: Delta) -> CompletionChoice:
        return CompletionChoice(
            index=answer.index,
            text=delta.content,
            logprobs=None,
            finish_reason=delta.finish_reason,
        )


class ChatReply(Reply[ChatRequest]):
    """Answers to `POST /v1/chat/completions`."""

    prefix = "chatcmpl"

    def make_answers(self) -> list[Answer]:
        request, service = self.request, self.service
        prompt = service.chat.prompt(request)
        newer = request.max_completion_tokens is not None
        field = "max_completion_tokens" if newer else "max_tokens"
        asked = service.generation(request, prompt, request.most_tokens, field)
        answers = []
        for index, one in enumerate(several(asked, self.n)):
            parser = service.chat.parser(request, prompt)
            text = service.text(request, one, parsed=parser is not None)
            answers.append(Answer(index, one, text, service.metrics.answer(), parser))
        return answers

    def whole(self, deltas: list[Delta]) -> ChatCompletion:
        choices = []
        for answer, delta in zip(self.answers, deltas, strict=True):
            reason = delta.finish_reason
            assert reason is not None, "an answer that is whole has ended"
            content = None if delta.calls and not delta.content else delta.content
            message = AnswerMessage(role="assistant", content=content, refusal=None)
            _add(message, delta)
            choices.append(
                ChatChoice(index=answer.index, message=message, logprobs=None, finish_reason=reason)
            )
        usage = usage_of(self.answers, self.n)
        return ChatCompletion(object="chat.completion", choices=choices, usage=usage, **self.head)

    def opening(self) -> list[ChatChunk]:
        return [
            self._chunk(answer.index, AnswerMessage(role="assistant", content=""))
            for answer in self.answers
        ]

    def chunk(self, answer: Answer, delta: Delta) -> ChatChunk:
        message = AnswerMessage(content=delta.content) if delta.content else AnswerMessage()
        _add(message, delta)
        return self._chunk(answer.index, message, delta.finish_reason)

    def usage_chunk(self) -> ChatChunk:
        usage = usage_of(self.answers, self.n)
        return ChatChunk(object="chat.completion.chunk", choices=[], usage=usage, **self.head)

    def _chunk(self, index: int, delta: AnswerMessage, reason: Any = None) -> ChatChunk:
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=reason)
        return ChatChunk(object="chat.completion.chunk", choices=[choice], **self.head)


def _add(message: AnswerMessage, delta: Delta) -> None:
    """Thoughts and calls, where there are any."""
    if delta.reasoning:
        message.reasoning_content = delta.reasoning
    if delta.calls:
        message.tool_calls = [
            ToolCall(
                index=call.index,
                id=f"call_{uuid.uuid4().hex[:24]}",
                type="function",
                function=CalledFunction(name=call.name, arguments=call.arguments),
            )
            for call in delta.calls
        ]
