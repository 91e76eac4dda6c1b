"""The answers of the API, as OpenAI's reference has them.

>>> Usage.of(prompt=5, new=3).total_tokens
8

A field that is not set is left out, so that a chunk of a stream has what a chunk has.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls"]


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, new: int) -> Usage:
        return cls(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new)


class CompletionLogprobs(BaseModel):
    """Log probabilities of a completion's tokens; offsets are letters of their texts."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer, or what a chunk adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """Answers to `POST /v1/completions`, or a chunk of them."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class CalledFunction(BaseModel):
    """A function that the model calls, its arguments in JSON."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call; `index` counts the calls of a stream."""

    index: int | None = None
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(BaseModel):
    """What the model says, or what a chunk adds to it."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: None = None


class TokenLogprob(BaseModel):
    """A token and its log probability; no bytes where it is a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TokenLogprob):
    """A token of the answer, and the likeliest ones in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Log probabilities of an answer's tokens."""

    content: list[ChatTokenLogprob]
    refusal: None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """Answers to `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunkChoice(BaseModel):
    """What a chunk adds to an answer."""

    index: int
    delta: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(BaseModel):
    """A chunk of a stream of chat completions."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Model(BaseModel):
    """The model that is served; `max_model_len` is vLLM's name for its context."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "besa"
    max_model_len: int


class ModelList(BaseModel):
    """Answer to `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class Error(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer that is an error."""

    error: Error


def to_json(answer: BaseModel) -> str:
    """What is set of an answer, its nulls included."""
    return answer.model_dump_json(exclude_unset=True)


def sse(answer: BaseModel | dict[str, Any]) -> str:
    """An event of a stream."""
    return f"data: {json.dumps(answer) if isinstance(answer, dict) else to_json(answer)}\n\n"
