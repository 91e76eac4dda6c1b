"""Values of requests: texts and their parts, messages, tools, prompts, stop strings, biases.

>>> Message(role="user", content=[{"type": "text", "text": "Hi"}]).content
'Hi'

Where OpenAI's reference lets a value have several forms, a request has it in one.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from besa.serve.api.fields import shortened, unsupported
from besa.serve.api.grammar import Kind

# A request is that many generations at most: prompts, times answers to each.
MOST_CHOICES = 128
_MOST_STOPS = 4


def wrong(words: str) -> PydanticCustomError:
    """An error of a value, in words that follow its name."""
    # Words are a value of the message, as they may have braces.
    return PydanticCustomError("wrong_value", "{words}", {"words": words})


class Strict(BaseModel):
    """An object of known fields, whose types are taken as they are: "5" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    """What a stream has besides its text; `include_obfuscation` is accepted without effect."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


TokenId = Annotated[int, Field(ge=0)]


class Structure(NamedTuple):
    """What an answer has to be, as besa.serve.api.grammar takes it."""

    kind: Kind
    text: str


_ANY_OBJECT = Structure("json", '{"type": "object"}')


class JsonSchema(Strict):
    """A schema with a name; answers keep to it, be it `strict` or not."""

    name: str = Field(min_length=1)
    description: str | None = None
    wanted: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """OpenAI's form of what an answer has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_a_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise wrong('must have a json_schema with the type "json_schema", and with no other')
        return self

    @property
    def structure(self) -> Structure | None:
        """None for any text."""
        if self.type == "text":
            return None
        if self.json_schema is None or self.json_schema.wanted is None:
            return _ANY_OBJECT
        return Structure("json", json.dumps(self.json_schema.wanted))


class StructuredOutputs(Strict):
    """vLLM's form of it: one of these."""

    schema_: str | dict[str, Any] | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _is_one(self) -> StructuredOutputs:
        given = (self.schema_, self.json_object or None, self.regex, self.choice, self.grammar)
        if sum(one is not None for one in given) != 1:
            raise wrong("must have one of json, json_object, regex, choice and grammar")
        return self

    @property
    def structure(self) -> Structure:
        if self.schema_ is not None:
            schema = self.schema_
            return Structure("json", schema if isinstance(schema, str) else json.dumps(schema))
        if self.choice is not None:
            return Structure("choice", json.dumps(self.choice))
        if self.regex is not None:
            return Structure("regex", self.regex)
        return _ANY_OBJECT if self.grammar is None else Structure("grammar", self.grammar)


def _not_strict(value: Any) -> Any:
    if value is True:
        raise unsupported("strict=True", "leave it out")
    return value


class Function(Strict):
    """A function that a model may call."""

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[bool | None, BeforeValidator(_not_strict)] = None


class Tool(Strict):
    """A tool, which is a function."""

    type: Literal["function"]
    function: Function


class CalledFunction(Strict):
    """A function that a model has called, its arguments in JSON."""

    name: str
    arguments: str


class ToolCall(Strict):
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
        raise wrong("must be a string, or a list of parts of type text")
    lines = []
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise wrong('must be a list of parts such as {"type": "text", "text": "…"}')
        if part["type"] != "text":
            raise unsupported(f"a part of type {shortened(part['type'])}", "it takes text")
        if not isinstance(part.get("text"), str) or part.keys() != {"type", "text"}:
            raise wrong("must have parts with a type and a text, and nothing else")
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


class Message(Strict):
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
            raise wrong("must have a content, or tool_calls")
        return self


def _stops(value: Any) -> Any:
    listed = [value] if isinstance(value, str) else value
    if listed is None:
        return []
    if not isinstance(listed, list) or not all(isinstance(s, str) and s for s in listed):
        raise wrong("must be a string or a list of strings, none of them empty")
    if len(listed) > _MOST_STOPS:
        raise wrong(f"must have {_MOST_STOPS} strings at most")
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
        raise wrong('must be an object of token numbers and their biases, as {"5": -100}')
    biases = value.values()
    if not all(isinstance(b, int | float) and not isinstance(b, bool) for b in biases):
        raise wrong("must have numbers as biases")
    if not all(-100 <= bias <= 100 for bias in biases):
        raise wrong("must have biases from -100 to 100")
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
    raise wrong("must be a string, a list of strings, token numbers, or a list of such lists")


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


def _listed(value: Any) -> Any:
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise wrong("must be a list of objects with a role and a content")
    return value


Messages = Annotated[list[Message], BeforeValidator(_listed)]
