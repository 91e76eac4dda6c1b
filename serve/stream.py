"""An answer on its way to the client: tokens become text, up to the first stop string.

>>> from transformers import AutoTokenizer
>>> tokenizer = AutoTokenizer.from_pretrained("path/to/sparse")
>>> async def answer(tokens):
...     stream = Stream(tokenizer, stops=["!"])
...     stream.extend(tokens)
...     stream.end()
...     pieces = []
...     while (piece := await stream.queue.get()) is not None:
...         pieces.append(piece)
...     return "".join(pieces)
>>> asyncio.run(answer(tokenizer("Hi! And more")["input_ids"]))
'Hi'

What may be the beginning of a stop string is kept back until it is known not to be one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from transformers.cli.serving.utils import (
    DirectStreamer,
    _GenerationCancelled,
    _StreamError,
    response_events_to_chunks,
)


class Stream(DirectStreamer):  # type: ignore[misc]
    """In the place of transformers' streamers, for every way to generate tokens.

    Attributes:
        queue: text, what a parser makes of it, an error; None is the end.
        tokens: what has been generated.
        text: what has been let through, before any parser.
        stopped: whether a stop string came.
        on_cancel: what else there is to do when nobody waits for the answer any more.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], parser: Any = None) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        super().__init__(
            tokenizer._tokenizer, asyncio.get_running_loop(), self.queue, response_parser=parser
        )
        self.stops = stops
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False
        self.on_cancel: Callable[[], None] = lambda: None
        self._held_back = ""
        self._begun = False
        self._ended = False

    def put(self, value: Any) -> None:
        """Called by `generate` with the prompt, and then with each token.

        Raises:
            _GenerationCancelled: no more is wanted.
        """
        if self._begun:
            self.extend(value.tolist())
        self._begun = True
        if self.stopped or self._cancelled.is_set():
            raise _GenerationCancelled

    def extend(self, tokens: Sequence[int]) -> None:
        """Takes the next tokens; those after a stop string are left out."""
        for token in tokens:
            if self.stopped:
                return
            self.tokens.append(token)
            self.total_tokens += 1
            self._held_back += self._decode_stream.step(self._tokenizer, token) or ""
            end = first_stop(self._held_back, self.stops)
            self.stopped = end is not None
            if end is None:
                end = len(self._held_back) - stop_prefix_length(self._held_back, self.stops)
            self._release(end)

    def end(self) -> None:
        """Lets go of what was kept back, and ends the queue."""
        if self._ended:
            return
        self._ended = True
        if not self.stopped:
            self._release(len(self._held_back))
        super().end()

    def fail(self, error: object) -> None:
        """Ends the queue with an error. transformers puts its words between quotes, as they are."""
        self._ended = True
        message = str(error).replace("\\", "/").replace('"', "'").replace("\n", " ")
        self._enqueue(_StreamError(message))

    def cancel(self) -> None:
        super().cancel()
        self.on_cancel()

    def _release(self, length: int) -> None:
        text, self._held_back = self._held_back[:length], self._held_back[length:]
        if not text:
            return
        self.text += text
        items = (
            [text] if self._parser is None else response_events_to_chunks(self._parser.feed(text))
        )
        for item in items:
            self._enqueue(item)


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string begins; None without one."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def stop_prefix_length(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    return max(
        (
            length
            for stop in stops
            for length in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:length])
        ),
        default=0,
    )
