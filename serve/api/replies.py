"""The answers to a request, whole or in chunks, as OpenAI's objects."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from besa.serve.api.answers import (
    AnswerMessage,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    ToolCall,
    Usage,
    sse,
)
from besa.serve.api.backend import BackendError
from besa.serve.api.chat import Delta, Parser
from besa.serve.api.errors import ApiError
from besa.serve.api.generation import Answer, pieces, several, usage_of
from besa.serve.api.logprobs import for_chat, for_completion
from besa.serve.api.requests import ChatRequest, CompletionRequest, Request
from besa.serve.api.service import Service
from besa.serve.api.values import MOST_CHOICES

R = TypeVar("R", bound=Request)
C = TypeVar("C", bound=Completion | ChatChunk)

# What a completion has if it does not say it, as OpenAI's.
_MOST_TOKENS = 16


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
            raise _failed(error) from error
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
            yield sse(_failed(error).body)
        yield "data: [DONE]\n\n"

    @property
    def usage(self) -> Usage:
        """The request's tokens so far."""
        return usage_of(self.answers, self.n)

    @property
    def _tells_usage(self) -> bool:
        options = self.request.stream_options
        return options is not None and bool(options.include_usage)

    def _with_usage(self, chunk: C) -> C:
        """A chunk with the usage so far if that is asked for, and null if only the last has it."""
        options = self.request.stream_options
        if self._tells_usage:
            always = options is not None and options.continuous_usage_stats
            chunk.usage = self.usage if always else None
        return chunk


class CompletionReply(Reply[CompletionRequest]):
    """Answers to `POST /v1/completions`."""

    prefix = "cmpl"

    def __init__(self, service: Service, request: CompletionRequest) -> None:
        super().__init__(service, request)
        self._letters = [0] * len(self.answers)  # whose log probabilities are told

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
            asked = service.generation(request, prompt, request.max_tokens or _MOST_TOKENS)
            for one in several(asked, self.n):
                text = service.text(request, one, parsed=False)
                metrics = service.metrics.answer()
                answers.append(Answer(len(answers), one, text, metrics, echo=echo))
        return answers

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            special = self.request.add_special_tokens is not False
            return list(self.service.tokenizer(prompt, add_special_tokens=special)["input_ids"])
        return prompt

    def whole(self, deltas: list[Delta]) -> Completion:
        choices = [self._choice(a, d) for a, d in zip(self.answers, deltas, strict=True)]
        return self._completion(choices, usage=self.usage)

    def chunk(self, answer: Answer, delta: Delta) -> Completion:
        return self._completion([self._choice(answer, delta)])

    def usage_chunk(self) -> Completion:
        return self._completion([], usage=self.usage)

    def _completion(self, choices: list[CompletionChoice], **more: Any) -> Completion:
        return Completion(object="text_completion", choices=choices, **self.head, **more)

    def _choice(self, answer: Answer, delta: Delta) -> CompletionChoice:
        return CompletionChoice(
            index=answer.index,
            text=delta.content,
            logprobs=self._logprobs(answer, delta),
            finish_reason=delta.finish_reason,
        )

    def _logprobs(self, answer: Answer, delta: Delta) -> CompletionLogprobs | None:
        if answer.request.logprobs is None:
            return None
        letters = self._letters[answer.index]
        found = for_completion(self.service.tokenizer, delta.likelihoods, letters)
        self._letters[answer.index] += sum(map(len, found.tokens))
        return found


class ChatReply(Reply[ChatRequest]):
    """Answers to `POST /v1/chat/completions`."""

    prefix = "chatcmpl"

    def make_answers(self) -> list[Answer]:
        request, service = self.request, self.service
        prompt = service.chat.prompt(request)
        asked = service.generation(request, prompt, request.most_tokens)
        answers = []
        for index, one in enumerate(several(asked, self.n)):
            parser = service.chat.parser(request, prompt)
            if one.grammar is not None:  # nothing but what was asked for may come
                _check_unparsed(request, parser)
                parser = None
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
                ChatChoice(
                    index=answer.index,
                    message=message,
                    logprobs=self._logprobs(answer, delta),
                    finish_reason=reason,
                )
            )
        return ChatCompletion(
            object="chat.completion", choices=choices, usage=self.usage, **self.head
        )

    def opening(self) -> list[ChatChunk]:
        return [
            self._chunk(answer, AnswerMessage(role="assistant", content=""), Delta())
            for answer in self.answers
        ]

    def chunk(self, answer: Answer, delta: Delta) -> ChatChunk:
        message = AnswerMessage(content=delta.content) if delta.content else AnswerMessage()
        _add(message, delta)
        return self._chunk(answer, message, delta)

    def usage_chunk(self) -> ChatChunk:
        return ChatChunk(object="chat.completion.chunk", choices=[], usage=self.usage, **self.head)

    def _chunk(self, answer: Answer, message: AnswerMessage, delta: Delta) -> ChatChunk:
        choice = ChatChunkChoice(
            index=answer.index,
            delta=message,
            logprobs=self._logprobs(answer, delta) if delta else None,
            finish_reason=delta.finish_reason,
        )
        return ChatChunk(object="chat.completion.chunk", choices=[choice], **self.head)

    def _logprobs(self, answer: Answer, delta: Delta) -> ChatLogprobs | None:
        if answer.request.logprobs is None:
            return None
        return for_chat(self.service.tokenizer, delta.likelihoods)


def _check_unparsed(request: ChatRequest, parser: Parser | None) -> None:
    """Raises an ApiError for what a grammar leaves no room for."""
    if request.tools and request.tool_choice != "none":
        raise ApiError(400, "tools do not go with response_format: leave one out", "tools")
    if parser is not None and parser.thinks:
        raise ApiError(
            400,
            "the model's chat template begins the answer with a thought, and response_format is of "
            "all of it: turn thoughts off by chat_template_kwargs",
            "response_format",
        )


def _failed(error: BackendError) -> ApiError:
    return ApiError(500, f"the engine failed: {error}")


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
