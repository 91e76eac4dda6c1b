"""ONNX Runtime GenAI in a thread of its own: requests in, tokens out to their streams.

A server makes one `OnnxBackend` for its model, and calls its `start(request)` for each
`GenerationRequest`, in an event loop.

On a CPU GenAI's engine batches statically: up to four of the requests that wait begin together, and
the next ones when all of these have ended. Requests that need the model's scores are answered
beside it (besa.serve.onnx.scored). All calls are made in one thread.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from besa.errors import BesaError
from besa.export.onnx.check import load_whole
from besa.export.onnx.runtime import genai
from besa.serve.api.backend import GenerationRequest, TokenStream
from besa.serve.onnx.description import described_by
from besa.serve.onnx.engine import genai_config
from besa.serve.onnx.scored import ScoredAnswer, needs_scores

_EVENTS = 64
# Answers of which we see the scores that are computed in turns; more wait, as they take memory.
_MOST_SCORED = 4
_LEAST = 1e-6


class OnnxBackend:
    """A model that generates for all requests.

    Args:
        trust_remote_code: as for `described_by`.

    Raises:
        BesaError: the model or its operators cannot be loaded.
    """

    def __init__(self, directory: Path, threads: int, trust_remote_code: bool = False) -> None:
        self._og = genai()
        described = described_by(directory, trust_remote_code)
        load_whole(directory / described["model"]["decoder"]["filename"])
        self.longest: int = described["model"]["context_length"]
        self.vocabulary: int = described["model"]["vocab_size"]
        ends = described["model"]["eos_token_id"]
        self.ends = frozenset(ends if isinstance(ends, list) else [ends])
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._running: list[_Generation] = []
        self._scored: list[ScoredAnswer] = []
        self._engine: Any = None
        self.failed: str | None = None
        loaded: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._thread = threading.Thread(
            target=self._run, args=(directory, threads, loaded), daemon=True
        )
        self._thread.start()
        if (error := loaded.get()) is not None:
            lines = str(error).splitlines() or [type(error).__name__]
            raise BesaError(f"{directory} cannot be loaded: {lines[0]}") from None

    def start(self, request: GenerationRequest) -> TokenStream:
        """Has a prompt continued; to be called in an event loop."""
        stream = TokenStream()
        if needs_scores(request):
            scored = ScoredAnswer(request, stream, self.ends)
            stream.on_cancel = lambda: self._work.put(lambda: self._end_scored(scored))
            self._work.put(lambda: self._scored.append(scored))
            return stream
        running = _Generation(request, stream)
        stream.on_cancel = lambda: self._work.put(lambda: self._cancel(running))
        self._work.put(lambda: self._begin(running))
        return stream

    def stop(self) -> None:
        """Ends the thread once it has nothing left to do, and lets go of the model."""
        self._work.put(None)
        self._thread.join()

    def _run(
        self, directory: Path, threads: int, loaded: queue.SimpleQueue[Exception | None]
    ) -> None:
        try:
            model = self._og.Model(genai_config(self._og, str(directory), threads))
            self._engine = self._og.Engine(model)
        except Exception as error:  # noqa: BLE001 - of many kinds, and the maker's to tell
            loaded.put(error)
            return
        loaded.put(None)
        events = self._engine.create_event_buffer(_EVENTS)
        stopping = False
        while not (stopping and not self._running and not self._scored):
            try:
                task = self._work.get(block=not self._running and not self._scored)
                if task is None:
                    stopping = True
                else:
                    task()
                continue  # all that came meanwhile may still join the next batch
            except queue.Empty:
                pass
            if self._running:
                self._step(events)
            for scored in self._scored[:_MOST_SCORED]:
                self._step_scored(scored, model)
        del events, self._engine

    def _step(self, events: Any) -> None:
        try:
            self._engine.run(events)
            for position in range(len(events)):
                self._take(events[position])
        except Exception as error:  # noqa: BLE001 - whatever it is, the clients learn of it
            self.failed = str(error)
            for running in self._running:
                running.stream.fail(error)
            self._running.clear()

    def _step_scored(self, scored: ScoredAnswer, model: Any) -> None:
        try:
            is_last = scored.step(self._og, model)
        except Exception as error:  # noqa: BLE001 - as above
            scored.stream.fail(error)
            is_last = True
        if is_last:
            self._end_scored(scored)

    def _end_scored(self, scored: ScoredAnswer) -> None:
        if scored in self._scored:
            self._scored.remove(scored)
            scored.stream.end()

    def _begin(self, running: _Generation) -> None:
        asked, og = running.asked, self._og
        options = og.RequestOptions()
        options.set_max_session_tokens(len(asked.prompt) + asked.max_tokens)
        try:
            running.request = self._engine.create_request(options=options)
            turn = og.TurnOptions(running.request)
            turn.set_max_generated_tokens(asked.max_tokens)
            turn.set_min_generated_tokens(
                asked.max_tokens if asked.ignore_eos else asked.min_tokens
            )
            turn.set_repetition_penalty(asked.repetition_penalty)
            sample = asked.temperature > 0 and asked.top_k != 1
            turn.set_do_sample(sample)
            if sample:  # with the likeliest token, it refuses them
                # Its numbers are of 32 bits: what is smaller would be 0, which it refuses.
                turn.set_temperature(max(asked.temperature, _LEAST))
                turn.set_top_k(asked.top_k)
                turn.set_top_p(max(asked.top_p, _LEAST))
            running.turn = running.request.begin_turn(np.array(asked.prompt, np.int32), turn)
        except Exception as error:  # noqa: BLE001
            running.stream.fail(error)
            return
        self._running.append(running)

    def _take(self, event: Any) -> None:
        flags, og = event.flags, self._og
        running = next((one for one in self._running if one.request == event.request), None)
        if running is None:  # it was cancelled
            return
        stream = running.stream
        if flags & og.EngineEventFlags.TOKEN:
            stream.put([event.token])
        if flags & og.EngineEventFlags.FAILED:
            stream.fail(f"the engine failed: {event.error_code.name}")
            self._forget(running)
        elif flags & og.EngineEventFlags.TURN_FINISHED:
            stream.end()
            self._forget(running)

    def _cancel(self, running: _Generation) -> None:
        """Ends a request early; its place in the batch is free when the others have ended."""
        if running not in self._running:
            return
        running.request.cancel_turn(running.turn)
        running.stream.end()
        self._forget(running)

    def _forget(self, running: _Generation) -> None:
        self._running.remove(running)
        running.request.close()


class _Generation:
    """A request on its way."""

    def __init__(self, asked: GenerationRequest, stream: TokenStream) -> None:
        self.asked, self.stream = asked, stream
        self.request: Any = None
        self.turn = 0
