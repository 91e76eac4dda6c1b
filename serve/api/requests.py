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
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from besa.serve.api.errors import ApiError, invalid
from besa.serve.api.fields import accepted, check_harmless, honoured, refused, supports
from besa.serve.api.values import (
    MOST_CHOICES,
    Biases,
    Messages,
    Prompts,
    ResponseFormat,
    Stops,
    StreamOptions,
    Strict,
    Structure,
    StructuredOutputs,
    TokenId,
    Tool,
    wrong,
)

_INT64 = (1 << 63) - 1
MOST_LOGPROBS = 20


class Request(Strict):
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
        "tokens that have so much of the likeliest one's probability", ge=0, le=1
    )
    seed: int | None = honoured("of this answer's chance", ge=-_INT64, le=_INT64)
    logit_bias: Biases = honoured("from -100 to 100, by token number", default={})
    frequency_penalty: float | None = honoured(
        "for each time that the answer has a token already", ge=-2, le=2
    )
    presence_penalty: float | None = honoured("for tokens that the answer has already", ge=-2, le=2)
    repetition_penalty: float | None = honoured(
        "for tokens of prompt and answer", ge=0.01, le=100, allow_inf_nan=False
    )
    min_tokens: int | None = honoured(
        "so many tokens come before the answer may end", ge=0, le=_INT64
    )
    ignore_eos: bool | None = honoured("as `min_tokens` of all tokens that may come")
    skip_special_tokens: bool | None = honoured("false shows them in the text")
    stop_token_ids: list[TokenId] | None = honoured(
        "the answer ends with any of them, as with the model's own ends"
    )
    response_format: ResponseFormat | None = honoured(
        "`text`, `json_object`, or `json_schema`, whose answers are JSON"
    )
    structured_outputs: StructuredOutputs | None = honoured(
        "vLLM's: `json`, `json_object`, `regex`, `choice` or `grammar`"
    )
    user: str | None = accepted("who asks")
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

    @property
    def structure(self) -> tuple[str, Structure] | None:
        """What the answer has to be, and the field that says it; None if it may be anything.

        Raises:
            ApiError: two fields say it.
        """
        asked, vllms = self.response_format, self.structured_outputs
        found = asked.structure if asked is not None else None
        if vllms is None:
            return None if found is None else ("response_format", found)
        if found is not None:
            raise ApiError(
                400,
                "response_format and structured_outputs say one thing: give one",
                "structured_outputs",
            )
        return "structured_outputs", vllms.structure

    @property
    def told_logprobs(self) -> int | None:
        """How many of the likeliest tokens are told with each; None to tell nothing.

        Raises:
            ApiError: fields that do not go together.
        """
        raise NotImplementedError

    @model_validator(mode="before")
    @classmethod
    def _check_text(cls, body: Any) -> Any:
        """JSON may have half of a surrogate pair, which is in no text that a tokenizer takes."""
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise wrong("has text with half of a surrogate pair") from None
        except RecursionError:
            raise wrong("is nested too deeply") from None
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
    max_tokens: int | None = honoured("16 if left out; as many come as fit", ge=1, le=_INT64)
    echo: bool | None = honoured("the prompt comes before the answer")
    add_special_tokens: bool | None = honoured("the tokenizer's, as its beginning token")
    logprobs: int | None = honoured(
        "of each token, and of so many of the likeliest in its place; not with `echo`",
        ge=0,
        le=MOST_LOGPROBS,
    )
    best_of: Any = refused(1)
    suffix: Any = refused("")

    @property
    def told_logprobs(self) -> int | None:
        if self.logprobs is not None and self.echo:
            raise ApiError(
                400,
                "logprobs with echo is not supported by this server: leave one out",
                "logprobs",
                "unsupported_parameter",
            )
        return self.logprobs


class ChatRequest(Request):
    """`POST /v1/chat/completions`."""

    messages: Messages = honoured("contents are text, or lists of parts of type text", default=...)
    max_tokens: int | None = honoured(
        "what is left of the context if left out; as many come as fit", ge=1, le=_INT64
    )
    max_completion_tokens: int | None = honoured("the newer name of it", ge=1, le=_INT64)
    logprobs: bool | None = honoured("of each token")
    top_logprobs: int | None = honoured(
        "so many of the likeliest tokens in its place, with `logprobs`", ge=0, le=MOST_LOGPROBS
    )
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
    def told_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

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
