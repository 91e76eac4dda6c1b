"""The requests of the API: OpenAI's fields, and vLLM's on top.

>>> request = parsed(ChatRequest, {"messages": [{"role": "user", "content": "Hi"}], "n": 1})
>>> request.messages[0].content
'Hi'
>>> parsed(ChatRequest, {"messages": "Hi"})
Traceback (most recent call last):
besa.serve.api.errors.ApiError: messages must be a list of objects with a role and a content

https://platform.openai.com/docs/api-reference/chat/create
https://docs.vllm.ai/en/latest/serving/openai_compatible_server/

Types are strict: what is a number in the reference has to be one here. What becomes of each field
is said by the function that makes it (besa.serve.api.fields).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from besa.serve.api.errors import ApiError, invalid
from besa.serve.api.fields import (
    accepted,
    check_harmless,
    honoured,
    refused,
    shortened,
    supports,
    unsupported,
)

# A request is that many generations at most: prompts, times answers to each.
MOST_CHOICES = 128
_MOST_STOPS = 4
_INT64 = (1 << 63) - 1


def _wrong(words: str) -> PydanticCustomError:
    # Words are a value of the message, as they may have braces.
    return PydanticCustomError("wrong_value", "{words}", {"words": words})


# ------------------------------------------------------------------------- parts of a request


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """What a stream has besides its text; `include_obfuscation` is accepted without effect."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


def _not_strict(value: Any) -> Any:
    if value is True:
        raise unsupported("strict=True", "leave it out")
    return value


class Function(_Strict):
    """A function that a model may call."""

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[bool | None, BeforeValidator(_not_strict)] = None


class Tool(_Strict):
    """A tool, which is a function."""

    type: Literal["function"]
    function: Function


class CalledFunction(_Strict):
    """A function that a model has called, its arguments in JSON."""

    name: str
    arguments: str


class ToolCall(_Strict):
    """A call in an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


def _text(content: Any) -> Any:
    """The text of a content, whose parts become lines as in vLLM."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _wrong("must be a string, or a list of parts of type text")
    lines = []
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise _wrong('must be a list of parts such as {"type": "text", "text": "…"}')
        if part["type"] != "text":
            raise unsupported(f"a part of type {shortened(part['type'])}", "it takes text")
        if not isinstance(part.get("text"), str) or part.keys() != {"type", "text"}:
            raise _wrong("must have parts with a type and a text, and nothing else")
        lines.append(part["text"])
    return "\n".join(lines)


_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}, {"type": "null"}]}
Content = Annotated[str | None, BeforeValidator(_text), WithJsonSchema(_CONTENT)]


class Message(_Strict):
    """A message of a chat. Of an answer that is sent back, what was empty may stay."""

    role: str = Field(min_length=1)
    content: Content = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: Literal[None] = None
    audio: Literal[None] = None
    function_call: Literal[None] = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise _wrong("must have a content, or tool_calls")
        return self


def _stops(value: Any) -> Any:
    listed = [value] if isinstance(value, str) else value
    if listed is None:
        return []
    if not isinstance(listed, list) or not all(isinstance(s, str) and s for s in listed):
        raise _wrong("must be a string or a list of strings, none of them empty")
    if len(listed) > _MOST_STOPS:
        raise _wrong(f"must have {_MOST_STOPS} strings at most")
    return listed


_STRING = {"type": "string", "minLength": 1}
_STOP = {
    "anyOf": [
        _STRING,
        {"type": "array", "items": _STRING, "maxItems": _MOST_STOPS},
        {"type": "null"},
    ]
}
Stops = Annotated[list[str], BeforeValidator(_stops), WithJsonSchema(_STOP)]


def _biases(value: Any) -> Any:
    """By token numbers, which are strings in JSON."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(
        isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 10
        for token in value
    ):
        raise _wrong('must be an object of token numbers and their biases, as {"5": -100}')
    biases = value.values()
    if not all(isinstance(b, int | float) and not isinstance(b, bool) for b in biases):
        raise _wrong("must have numbers as biases")
    if not all(-100 <= bias <= 100 for bias in biases):
        raise _wrong("must have biases from -100 to 100")
    return {int(token): float(bias) for token, bias in value.items()}


_BIAS = {
    "anyOf": [
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        },
        {"type": "null"},
    ]
}
Biases = Annotated[dict[int, float], BeforeValidator(_biases), WithJsonSchema(_BIAS)]


def _prompts(value: Any) -> Any:
    """Always a list: of texts, or of lists of token numbers."""
    found = [value] if isinstance(value, str) else value
    if isinstance(found, list) and found:
        if all(type(one) is int for one in found):
            found = [found]
        texts = all(isinstance(one, str) for one in found)
        tokens = all(
            isinstance(one, list) and one and all(type(token) is int for token in one)
            for one in found
        )
        if texts or tokens:
            return found
    raise _wrong("must be a string, a list of strings, token numbers, or a list of such lists")


_TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MOST_CHOICES},
        _TOKENS,
        {"type": "array", "items": _TOKENS, "minItems": 1, "maxItems": MOST_CHOICES},
    ]
}
Prompts = Annotated[list[str] | list[list[int]], BeforeValidator(_prompts), WithJsonSchema(_PROMPT)]


def _messages(value: Any) -> Any:
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise _wrong("must be a list of objects with a role and a content")
    return value


# ------------------------------------------------------------------------- both requests

_TORCH = ("transformers",)


class Request(_Strict):
    """What completions and chat completions have in common."""

    model: str | None = honoured("the served model's name, or none")
    n: int | None = honoured("answers to each prompt", 1, ge=1, le=MOST_CHOICES)
    stream: bool | None = honoured("server-sent events, token by token", default=False)
    stream_options: StreamOptions | None = honoured(
        "`include_usage`, and vLLM's `continuous_usage_stats`"
    )
    stop: Stops = honoured("up to four strings; the answer ends before them", default=[])
    temperature: float | None = honoured(
        "0 takes the likeliest token, whatever else is asked", ge=0, le=100, allow_inf_nan=False
    )
    top_p: float | None = honoured(
        "the likeliest tokens that have so much of the probability", gt=0, le=1
    )
    top_k: int | None = honoured("0 or -1 for all tokens", ge=-1, le=_INT64)
    min_p: float | None = honoured(
        "tokens that have so much of the likeliest one's probability",
        by=_TORCH,
        harmless=(0,),
        ge=0,
        le=1,
    )
    seed: int | None = honoured(
        "of this answer's chance; with temperature 0 there is none, and any engine takes it",
        by=_TORCH,
        ge=-_INT64,
        le=_INT64,
    )
    logit_bias: Biases = honoured(
        "from -100 to 100, by token number", default={}, by=_TORCH, harmless=({},)
    )
    frequency_penalty: float | None = honoured(
        "for each time that the answer has a token already", by=_TORCH, harmless=(0,), ge=-2, le=2
    )
    presence_penalty: float | None = honoured(
        "for tokens that the answer has already", by=_TORCH, harmless=(0,), ge=-2, le=2
    )
    repetition_penalty: float | None = honoured(
        "for tokens of prompt and answer", gt=0, le=100, allow_inf_nan=False
    )
    min_tokens: int | None = honoured(
        "so many tokens come before the answer may end", ge=0, le=_INT64
    )
    ignore_eos: bool | None = honoured("as `min_tokens` of all tokens that may come")
    skip_special_tokens: bool | None = honoured("false shows them in the text")
    user: str | None = accepted("who asks")
    stop_token_ids: Any = refused([])
    length_penalty: Any = refused(1.0)
    use_beam_search: Any = refused(False)
    include_stop_str_in_output: Any = refused(False)
    spaces_between_special_tokens: Any = refused(True)
    truncate_prompt_tokens: Any = refused()
    truncation_side: Any = refused()
    allowed_token_ids: Any = refused()
    bad_words: Any = refused([])
    prompt_logprobs: Any = refused()
    logprob_token_ids: Any = refused()
    prompt_embeds: Any = refused()
    return_tokens_as_token_ids: Any = refused(False)
    return_token_ids: Any = refused(False)
    return_token_offsets: Any = refused(False)
    response_format: Any = refused({"type": "text"})
    structured_outputs: Any = refused()
    guided_json: Any = refused()
    guided_regex: Any = refused()
    guided_choice: Any = refused()
    guided_grammar: Any = refused()
    guided_whitespace_pattern: Any = refused()
    guided_decoding_backend: Any = refused()
    logits_processors: Any = refused([])
    thinking_token_budget: Any = refused()
    repetition_detection: Any = refused()
    stream_interval: Any = refused(1)
    watermarking: Any = refused(False)
    priority: Any = refused(0)
    request_id: str | None = accepted("vLLM's; ours is the header `x-request-id`")
    session_id: str | None = accepted("whose conversation it is")
    cache_salt: Any = refused()
    kv_transfer_params: Any = refused()
    ec_transfer_params: Any = refused()
    vllm_xargs: Any = refused({})
    routed_experts_prompt_start: Any = refused(0)
    mm_payload: Any = refused("tensors")
    return_mm_kwargs: Any = refused(False)

    @model_validator(mode="before")
    @classmethod
    def _check_text(cls, body: Any) -> Any:
        """JSON may have half of a surrogate pair, which is in no text that a tokenizer takes."""
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _wrong("has text with half of a surrogate pair") from None
        except RecursionError:
            raise _wrong("is nested too deeply") from None
        return body

    @field_validator("*", mode="before")
    @classmethod
    def _check_support(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        return check_harmless(supports(cls)[info.field_name], info.field_name, value)


class CompletionRequest(Request):
    """`POST /v1/completions`."""

    prompt: Annotated[Prompts, Field(description="a text, token numbers, or a list of either")] = (
        honoured("a text, several, token numbers, or lists of them", default=...)
    )
    max_tokens: int | None = honoured("16 if left out; they have to fit", ge=1, le=_INT64)
    echo: bool | None = honoured("the prompt comes before the answer")
    add_special_tokens: bool | None = honoured("the tokenizer's, as its beginning token")
    best_of: Any = refused(1)
    logprobs: Any = refused(False)
    suffix: Any = refused("")


class ChatRequest(Request):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], BeforeValidator(_messages)] = honoured(
        "contents are text, or lists of parts of type text", default=...
    )
    max_tokens: int | None = honoured(
        "what is left of the context if left out; they have to fit", ge=1, le=_INT64
    )
    max_completion_tokens: int | None = honoured("the newer name of it", ge=1, le=_INT64)
    tools: list[Tool] | None = honoured(
        "where the model's chat template has a place for them, and its calls can be read"
    )
    tool_choice: Literal["none", "auto"] | None = honoured("a named function is refused")
    add_generation_prompt: bool | None = honoured("of the chat template", default=True)
    continue_final_message: bool | None = honoured("the answer goes on with the last message")
    chat_template_kwargs: dict[str, Any] | None = honoured("variables of the chat template")
    metadata: dict[str, Any] | None = accepted("what is kept with the answer")
    safety_identifier: str | None = accepted("who asks")
    prompt_cache_key: str | None = accepted("what the prompt has in common with others")
    service_tier: Any = refused("auto", "default")
    store: Any = refused(False)
    add_special_tokens: Any = refused(False)
    audio: Any = refused()
    chat_template: Any = refused()
    documents: Any = refused([])
    echo: Any = refused(False)
    function_call: Any = refused("none", "auto")
    functions: Any = refused([])
    include_reasoning: Any = refused(True)
    logprobs: Any = refused(False)
    top_logprobs: Any = refused(0)
    media_io_kwargs: Any = refused({})
    mm_processor_kwargs: Any = refused({})
    modalities: Any = refused(["text"])
    moderation: Any = refused()
    parallel_tool_calls: Any = refused(True)
    prediction: Any = refused()
    prompt_cache_options: Any = refused()
    prompt_cache_retention: Any = refused()
    reasoning_effort: Any = refused()
    return_prompt_text: Any = refused(False)
    verbosity: Any = refused("medium")
    web_search_options: Any = refused()

    @property
    def most_tokens(self) -> int | None:
        """How many tokens may come; None for what is left of the context.

        Raises:
            ApiError: its two fields say two things.
        """
        newer, older = self.max_completion_tokens, self.max_tokens
        if newer is not None and older is not None and newer != older:
            raise ApiError(
                400, "max_tokens and max_completion_tokens are one limit: give one", "max_tokens"
            )
        return older if newer is None else newer


REQUESTS = {"completions": CompletionRequest, "chat": ChatRequest}

R = TypeVar("R", bound=BaseModel)


def parsed(kind: type[R], body: Mapping[str, Any]) -> R:
    """A request of some kind.

    Raises:
        ApiError: it is none, as the first thing that is wrong says.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False)) from None
