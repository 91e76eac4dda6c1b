"""What an engine is to the API: requests of token numbers in, tokens as they come out.

>>> class Counting:
...     '''An engine that counts.'''
...     longest, vocabulary, ends, failed = 64, 64, frozenset({0}), None
...     def start(self, request):
...         stream = TokenStream()
...         stream.put(range(1, request.max_tokens + 1))
...         stream.end()
...         return stream
>>> async def tokens(backend, request):
...     return [token async for step in backend.start(request) for token in step.tokens]
>>> asyncio.run(tokens(Counting(), GenerationRequest([1], max_tokens=3)))
[1, 2, 3]
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from besa.serve.api.grammar import Grammar


@dataclass(frozen=True)
class GenerationRequest:
    """What is to be generated.

    Attributes:
        prompt: token numbers.
        max_tokens: new tokens, at most.
        min_tokens: new tokens before one may come that ends the text.
        ignore_eos: whether none of the model's tokens that end a text may come.
        stop_token_ids: tokens that end this text, too.
        temperature: 0 takes the likeliest token; `top_p`, `top_k` and `min_p` do nothing then.
        top_k: 0 for all tokens.
        repetition_penalty: for tokens of prompt and answer, a factor.
        frequency_penalty, presence_penalty: for tokens of the answer, taken off.
        logit_bias: by token.
        seed: None for chance that all requests share.
        grammar: what the answer has to be; None for anything.
        logprobs: how many of the likeliest tokens are told with each; None to tell nothing.
    """

    prompt: list[int]
    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    grammar: Grammar | None = None
    logprobs: int | None = None


@dataclass(frozen=True)
class Likelihood:
    """How likely a token was: logarithms of probabilities.

    Attributes:
        top: the likeliest tokens and theirs, the likeliest first.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Step:
    """What comes of an answer at once; likelihoods only if they were asked for."""

    tokens: list[int]
    likelihoods: list[Likelihood]


class BackendError(Exception):
    """An engine could not go on; its message is for the client."""


class TokenStream:
    """The tokens of one answer, from an engine's thread to the event loop that made this.

    Attributes:
        is_cancelled: whether nobody waits for more.
        on_cancel: what the engine does then.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Step | BackendError | None] = asyncio.Queue()
        self.is_cancelled = False
        self.on_cancel: Callable[[], None] = lambda: None

    def put(self, tokens: Iterable[int], likelihoods: Iterable[Likelihood] = ()) -> None:
        """Hands on the next tokens; from any thread, as `end` and `fail`."""
        self._send(Step(list(tokens), list(likelihoods)))

    def end(self) -> None:
        """No token comes any more."""
        self._send(None)

    def fail(self, error: object) -> None:
        """No token comes any more, as the engine failed."""
        self._send(BackendError(str(error)))

    def cancel(self) -> None:
        """Lets the engine stop; of no effect on what has ended."""
        if not self.is_cancelled:
            self.is_cancelled = True
            self.on_cancel()

    async def __aiter__(self) -> AsyncIterator[Step]:
        while (item := await self._queue.get()) is not None:
            if isinstance(item, BackendError):
                raise item
            yield item

    def _send(self, item: Step | BackendError | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)


class Backend(Protocol):
    """An engine with a model.

    Attributes:
        longest: tokens of the context, prompt and answer.
        vocabulary: tokens that the model knows.
        ends: tokens that end a text. An engine hands on the one that it stopped at.
        failed: why it can answer nothing any more; None if it can.
    """

    longest: int
    vocabulary: int
    ends: frozenset[int]

    @property
    def failed(self) -> str | None: ...

    def start(self, request: GenerationRequest) -> TokenStream:
        """Has a prompt continued; to be called in an event loop."""
        ...
