"""A request's answers: one or several streams of tokens, as text, a piece at a time.

There is an `Answer` for each prompt and each of `n`. `pieces` starts them all, and gives what comes
from whichever. Whoever stops asking stops the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from besa.serve.api.answers import FinishReason, Usage
from besa.serve.api.backend import Backend, GenerationRequest
from besa.serve.api.chat import Delta, Parser
from besa.serve.api.metrics import AnswerMetrics
from besa.serve.api.text import AnswerText


class Answer:
    """One answer.

    Args:
        index: its place among the request's answers.
        echo: what comes before it.
    """

    def __init__(
        self,
        index: int,
        request: GenerationRequest,
        text: AnswerText,
        metrics: AnswerMetrics,
        parser: Parser | None = None,
        echo: str = "",
    ) -> None:
        self.index, self.request, self.text = index, request, text
        self._metrics, self._parser, self._echo = metrics, parser, echo

    async def deltas(self, backend: Backend) -> AsyncGenerator[Delta]:
        """What comes of it, bit by bit; the last one says why it ends.

        Raises:
            BackendError: the engine failed.
        """
        self._metrics.began(len(self.request.prompt))
        stream = backend.start(self.request)
        try:
            yield self._parser.first if self._parser else Delta(self._echo)
            async for step in stream:
                self._metrics.got(len(step.tokens))
                before = self.text.tokens
                delta = self._read(self.text.extend(step.tokens))
                taken = step.likelihoods[: self.text.tokens - before]
                yield replace(delta, likelihoods=taken)
                if self.text.stopped:
                    break
            rest = self._read(self.text.rest())
            last = self._parser.finish() if self._parser else Delta()
            yield rest + last + Delta(finish_reason=self._reason())
        finally:
            stream.cancel()
            self._metrics.ended()

    def _read(self, text: str) -> Delta:
        return self._parser.feed(text) if self._parser else Delta(text)

    def _reason(self) -> FinishReason:
        if self._parser is not None and self._parser.calls:
            return "tool_calls"
        full = self.text.tokens >= self.request.max_tokens
        return "length" if full and not self.text.stopped else "stop"


def several(request: GenerationRequest, n: int) -> list[GenerationRequest]:
    """The same request so many times, each with a seed of its own if it has one."""
    if request.seed is None:
        return [request] * n
    return [replace(request, seed=request.seed + number) for number in range(n)]


async def pieces(
    answers: Sequence[Answer], backend: Backend
) -> AsyncGenerator[tuple[Answer, Delta]]:
    """What comes of all answers, as it comes.

    Raises:
        BackendError: the engine failed.
    """
    if len(answers) == 1:  # no task in between
        async with aclosing(answers[0].deltas(backend)) as deltas:
            async for delta in deltas:
                yield answers[0], delta
        return
    queue: asyncio.Queue[tuple[Answer, Delta] | None] = asyncio.Queue()

    async def drain(answer: Answer) -> None:
        try:
            async with aclosing(answer.deltas(backend)) as deltas:
                async for delta in deltas:
                    queue.put_nowait((answer, delta))
        finally:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(drain(answer)) for answer in answers]
    try:
        running = len(tasks)
        while running:
            if (item := await queue.get()) is not None:
                yield item
                continue
            running -= 1
            for task in tasks:
                if task.done() and (error := task.exception()) is not None:
                    raise error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def usage_of(answers: Sequence[Answer], n: int) -> Usage:
    """Tokens of a request: a prompt counts once, however many answers it has."""
    prompt = sum(len(answer.request.prompt) for answer in answers[::n])
    return Usage.of(prompt, sum(answer.text.tokens for answer in answers))
