"""An engine that computes nothing: it says what it is told to, so that tests reach every answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from besa.serve.api.app import application
from besa.serve.api.backend import Backend, GenerationRequest, Likelihood, TokenStream
from besa.serve.api.chat import Chat
from besa.serve.api.metrics import Metrics
from besa.serve.api.middleware import App
from besa.serve.api.service import Service

NAME = "parrot"
TEMPLATE = (
    "{% if tools %}tools: {% for t in tools %}{{ t.function.name }} {% endfor %}\n{% endif %}"
    "{% if mood %}({{ mood }}){% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments.a }})"
    "{% endfor %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
# How the parrot words thoughts and calls.
RESPONSES = {
    "defaults": {"role": "assistant"},
    "start_anchor": "assistant:",
    "fields": {
        "thinking": {"open": "<t>", "close": "</t>", "content": "text"},
        "tool_calls": {
            "open": "<c>",
            "close": "</c>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"content": "text"},
    },
}


class Parrot:
    """An engine, by the protocol of besa.serve.api.backend.

    Attributes:
        says: the text of its answers; None for prompts said once more.
        endless: whether it goes on until it is cancelled.
        error: what it fails with after the first token.
        asked: the requests that it got, and their streams.
    """

    longest, vocabulary, ends = 128, 257, frozenset({0})

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.says: str | None = None
        self.endless = False
        self.error: str | None = None
        self.failed: str | None = None
        self.asked: list[GenerationRequest] = []
        self.streams: list[TokenStream] = []

    def start(self, request: GenerationRequest) -> TokenStream:
        stream = TokenStream()
        self.asked.append(request)
        self.streams.append(stream)
        if self.endless:
            self._task = asyncio.ensure_future(self._go_on(stream))
            return stream
        tokens = self.tokenizer.encode(self.says) if self.says is not None else request.prompt
        for token in [*tokens, 0][: request.max_tokens]:
            stream.put([token], self._likelihoods(token, request.logprobs))
            if self.error is not None:
                stream.fail(self.error)
                return stream
        stream.end()
        return stream

    def _likelihoods(self, token: int, most: int | None) -> list[Likelihood]:
        """Each token's is -0.5, and "z" was likelier."""
        [z] = self.tokenizer.encode("z")
        return [] if most is None else [Likelihood(token, -0.5, [(z, -0.25), (token, -0.5)][:most])]

    async def _go_on(self, stream: TokenStream) -> None:
        while not stream.is_cancelled:
            stream.put([7])
            await asyncio.sleep(0.001)
        stream.end()


def parrot(model: Path, parses: bool = False) -> Parrot:
    """A parrot with the tokenizer of a model.

    Args:
        parses: whether its thoughts and calls are told apart from its text.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    if parses:
        tokenizer.response_template = RESPONSES
    return Parrot(tokenizer)


def served(
    engine: Parrot,
    key: str | None = None,
    cors: bool = False,
    defaults: Mapping[str, float] | None = None,
) -> App:
    """The application over a parrot."""
    return over(engine, engine.tokenizer, defaults or {}, key, cors)


def over(
    backend: Backend,
    tokenizer: Any,
    defaults: Mapping[str, float],
    key: str | None = None,
    cors: bool = False,
) -> App:
    """The application over any engine."""
    service = Service(backend, Chat(tokenizer), NAME, defaults, Metrics(NAME))
    return application(service, key=key, cors=cors)
