"""What an engine is to the API: requests of token numbers in, tokens as they come out.

>>> class Counting:
...     '''An engine that counts.'''
...     name, longest, vocabulary, ends, failed = "onnx", 64, 64, frozenset({0}), None
...     def start(self, request):
...         stream = TokenStream()
...         stream.put(range(1, request.max_tokens + 1))
...         stream.end()
...         return stream
>>> async def tokens(backend, request):
...     return [token async for step in backend.start(request) for token in step]
>>> asyncio.run(tokens(Counting(), GenerationRequest([1], max_tokens=3)))
[1, 2, 3]
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class GenerationRequest:
    """What is to be generated.

    Attributes:
        prompt: token numbers.
        max_tokens: new tokens, at most.
        min_tokens: new tokens before one may come that ends the text.
        temperature: 0 takes the likeliest token; `top_p`, `top_k` and `min_p` do nothing then.
        top_k: 0 for all tokens.
        repetition_penalty: for tokens of prompt and answer, a factor.
        frequency_penalty, presence_penalty: for tokens of the answer, taken off.
        logit_bias: by token.
        seed: None for chance that all requests share.
    """

    prompt: list[int]
    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None


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
        self._queue: asyncio.Queue[list[int] | BackendError | None] = asyncio.Queue()
        self.is_cancelled = False
        self.on_cancel: Callable[[], None] = lambda: None

    def put(self, tokens: Iterable[int]) -> None:
        """Hands on the next tokens; from any thread, as `end` and `fail`."""
        self._send(list(tokens))

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

    async def __aiter__(self) -> AsyncIterator[list[int]]:
        while (item := await self._queue.get()) is not None:
            if isinstance(item, BackendError):
                raise item
            yield item

    def _send(self, item: list[int] | BackendError | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)


class Backend(Protocol):
    """An engine with a model.

    Attributes:
        name: what `--engine` calls it.
        longest: tokens of the context, prompt and answer.
        vocabulary: tokens that the model knows.
        ends: tokens that end a text. An engine hands on the one that it stopped at.
        failed: why it can answer nothing any more; None if it can.
    """

    name: str
    longest: int
    vocabulary: int
    ends: frozenset[int]

    @property
    def failed(self) -> str | None: ...

    def start(self, request: GenerationRequest) -> TokenStream:
        """Has a prompt continued; to be called in an event loop."""
        ...
