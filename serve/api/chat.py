"""A chat becomes a prompt by the model's template, and the model's answer a message again.

>>> from transformers import AutoTokenizer
>>> from besa.serve.api.requests import ChatRequest
>>> chat = Chat(AutoTokenizer.from_pretrained("path/to/sparse"))
>>> chat.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\\n{% endfor %}"
>>> request = ChatRequest(messages=[{"role": "user", "content": "Hi"}])
>>> chat.tokenizer.decode(chat.prompt(request))
'Hi\\n'

Tools are honoured where the template has a place for them and transformers knows how the model
words its calls (`response_template`). Text between the marks of a thought is `reasoning_content`.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from transformers.cli.serving.utils import get_response_template
from transformers.utils.chat_parsing import ResponseParser

from besa.serve.api.answers import FinishReason
from besa.serve.api.backend import Likelihood
from besa.serve.api.errors import ApiError, ascii_only
from besa.serve.api.requests import ChatRequest
from besa.serve.api.values import Message


@dataclass(frozen=True)
class Call:
    """A function that the model calls, by its place among the answer's; arguments are JSON."""

    index: int
    name: str
    arguments: str


@dataclass(frozen=True)
class Delta:
    """What the next tokens add to an answer; the last has the reason why it ends."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    likelihoods: list[Likelihood] = field(default_factory=list)

    def __bool__(self) -> bool:
        said = self.content or self.reasoning or self.calls
        return bool(said or self.finish_reason or self.likelihoods)

    def __add__(self, other: Delta) -> Delta:
        return Delta(
            self.content + other.content,
            self.reasoning + other.reasoning,
            self.calls + other.calls,
            other.finish_reason,
            self.likelihoods + other.likelihoods,
        )


class Chat:
    """The chats of a model.

    Args:
        tokenizer: transformers', with the model's chat template.
        model_type: as config.json has it; transformers knows by it how some models word calls.
        defaults: variables of the template, where a request does not give them.
    """

    def __init__(
        self, tokenizer: Any, model_type: str = "", defaults: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.defaults = dict(defaults or {})
        config = SimpleNamespace(model_type=model_type)
        self.response_template = get_response_template(tokenizer, SimpleNamespace(config=config))
        if self.response_template is not None:
            ResponseParser(self.response_template, prefix="")  # a broken one fails here

    def prompt(self, request: ChatRequest) -> list[int]:
        """The tokens of a chat.

        Raises:
            ApiError: the template cannot take it.
        """
        messages = [_plain(*each) for each in enumerate(request.messages)]
        variables = self._variables(request)
        tools = self._tools(request)
        text = self._rendered(request, messages, variables, tools)
        if tools and text == self._rendered(request, messages, variables, None):
            raise _no_place("tools", "tools")
        without = [
            {name: value for name, value in message.items() if name != "tool_calls"}
            for message in messages
        ]
        if without != messages and text == self._rendered(request, without, variables, tools):
            raise _no_place("tool_calls", "messages")
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def parser(self, request: ChatRequest, prompt: list[int]) -> Parser | None:
        """What reads an answer to the prompt; None where an answer is its text."""
        if self.response_template is None:
            return None
        return Parser(
            ResponseParser(
                self.response_template,
                prefix=self.tokenizer.decode(prompt),
                tools=self._tools(request),
            )
        )

    def _tools(self, request: ChatRequest) -> list[dict[str, Any]] | None:
        if not request.tools or request.tool_choice == "none":
            return None
        if self.response_template is None:
            raise ApiError(
                400,
                "tools are not supported by this server: transformers does not know how the model "
                "words its calls",
                "tools",
                "unsupported_parameter",
            )
        return [tool.model_dump(exclude_none=True) for tool in request.tools]

    def _variables(self, request: ChatRequest) -> dict[str, Any]:
        asked = request.chat_template_kwargs or {}
        own = inspect.signature(self.tokenizer.apply_chat_template).parameters
        for name in asked:
            if name in own or not re.search(rf"\b{re.escape(name)}\b", self._template()):
                path = f"chat_template_kwargs.{ascii_only(name, 60)}"
                raise ApiError(
                    400,
                    f"{path} is no variable of the model's chat template",
                    "chat_template_kwargs",
                )
        return {**self.defaults, **asked}

    def _template(self) -> str:
        found = self.tokenizer.chat_template
        return " ".join(found.values()) if isinstance(found, dict) else str(found)

    def _rendered(
        self,
        request: ChatRequest,
        messages: list[dict[str, Any]],
        variables: Mapping[str, Any],
        tools: list[dict[str, Any]] | None,
    ) -> str:
        if not self.tokenizer.chat_template:
            raise ApiError(400, "the model has no chat template: use /v1/completions", "messages")
        goes_on = bool(request.continue_final_message)
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=request.add_generation_prompt is not False and not goes_on,
                continue_final_message=goes_on,
                **variables,
            )
        except Exception as error:  # a template may raise anything, and what it got is the client's
            lines = str(error).splitlines() or [type(error).__name__]
            shown = lines[0].encode("ascii", "backslashreplace").decode()
            raise ApiError(
                400, f"the model's chat template refuses the messages: {shown}", "messages"
            ) from error
        return text


def _no_place(what: str, field: str) -> ApiError:
    """What a template leaves out, as its text is the same without it."""
    return ApiError(
        400,
        f"{what} are not supported by this server: the model's chat template has no place for them",
        field,
        "unsupported_parameter",
    )


def _plain(number: int, message: Message) -> dict[str, Any]:
    """A message as templates take it: without what is empty, and arguments as objects."""
    found = message.model_dump(exclude_none=True, exclude={"annotations"})
    found.setdefault("content", "")
    calls = found.pop("tool_calls", None)
    for position, call in enumerate(calls or []):
        call.pop("index", None)
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"] or "{}")
        except ValueError:
            path = f"messages[{number}].tool_calls[{position}].function.arguments"
            raise ApiError(400, f"{path} must be JSON", path) from None
    return {**found, "tool_calls": calls} if calls else found


class Parser:
    """Tells an answer's text, its thoughts and its calls apart, as they come.

    Attributes:
        first: what the prompt has of the answer already.
        thinks: whether the prompt ends amid a thought.
        calls: how many functions the answer has called.
    """

    def __init__(self, parser: ResponseParser) -> None:
        self._parser = parser
        self._unread = ""  # the beginning of a call
        self._failed = False
        self.calls = 0
        self.first = self._delta(parser.initial_events)
        opened = [e for e in parser.initial_events if e["type"] in ("region_open", "region_close")]
        last = opened[-1] if opened else {}
        self.thinks = last.get("type") == "region_open" and last.get("field") == "thinking"

    def feed(self, text: str) -> Delta:
        """What the next text adds."""
        if self._failed:
            return Delta(text)
        try:
            return self._delta(self._parser.feed(text))
        except ValueError:  # what the model says is no call: it stays text
            self._failed = True
            return Delta(self._unread + text)

    def finish(self) -> Delta:
        """What the end of the text adds."""
        if self._failed:
            return Delta()
        try:
            return self._delta(self._parser.finalize()[1])
        except ValueError:  # it ended amid a call
            return Delta(self._unread)

    def _delta(self, events: list[dict[str, Any]]) -> Delta:
        content = reasoning = ""
        calls = []
        for event in events:
            is_text = event["type"] == "region_chunk" and not event.get("dirty")
            if is_text and event.get("field") == "content":
                content += event.get("text") or ""
            elif is_text and event.get("field") == "thinking":
                reasoning += event.get("text") or ""
            elif event["type"] == "region_chunk":
                self._unread += event.get("text") or ""
            elif event["type"] == "region_close":
                if event.get("field") == "tool_calls":
                    calls.append(_call(self.calls, event["value"]))
                    self.calls += 1
                self._unread = ""
        return Delta(content, reasoning, calls)


def _call(index: int, value: Any) -> Call:
    """A call as response templates have it.

    Raises:
        ValueError: it is none.
    """
    try:
        name, arguments = value["function"]["name"], value["function"]["arguments"]
    except (KeyError, TypeError):
        raise ValueError("no call") from None
    return Call(index, name, arguments if isinstance(arguments, str) else json.dumps(arguments))
