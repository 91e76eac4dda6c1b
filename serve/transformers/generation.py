"""Generation in transformers' server: many requests at a time, or one after the other.

transformers' own `GenerationState` has a manager for either way, and each ignores something: stop
strings, the sampling of each request, the end of a request that was cancelled. The one here takes
their place. Both of its ways share one `Stream`, and heed everything that a request asks for.

On a CPU, requests are batched (see besa.serve.transformers.batching) if the model's attention
allows it.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import torch
from fastapi import HTTPException
from transformers.cli.serving.utils import (
    BaseGenerateManager,
    GenerationState,
    InferenceThread,
    _GenerationCancelled,
    _StreamError,
)

from besa.serve.stream import Stream
from besa.serve.transformers.batching import Batches, attention_can_be_paged, sampling


class Generation(GenerationState):  # type: ignore[misc]
    """Has one manager, as there is one model."""

    manager: Manager | None = None

    def use_continuous_batching(self, model: Any, *_: Any) -> bool:
        """Makes the manager for the model.

        Returns:
            False: the manager takes tensors, whether it batches or not.
        """
        if self.manager is None:
            batches = self._batches(model) if self._continuous_batching else None
            self.manager = Manager(batches)
        return False

    def get_manager(self, *_: Any, **__: Any) -> Manager:
        assert self.manager is not None
        return self.manager

    def is_cb_alive(self) -> bool:
        return self.manager is None or self.manager.is_alive()

    def _batches(self, model: Any) -> Batches | None:
        try:
            if attention_can_be_paged(model):
                return Batches(model, self._cb_config)
            reason = f"{type(model).__name__}'s attention cannot be paged"
        except Exception as error:  # noqa: BLE001 - of many kinds, and all for the same reason
            reason = str(error).split("\n")[0]
        print(f"requests are answered one after the other: {reason}", file=sys.stderr)
        return None


class Manager(BaseGenerateManager):  # type: ignore[misc]
    """Generates for the handlers of transformers' server.

    Args:
        batches: what batches requests; None to answer one after the other.
    """

    def __init__(self, batches: Batches | None) -> None:
        self.batches = batches
        self.thread = InferenceThread()

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,  # noqa: ARG002 - the interface's, and the client's: it may come twice
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue[Any], Stream]:
        """Starts a generation; its text arrives in the queue.

        Raises:
            HTTPException: the prompt is empty or does not fit.
        """
        prompt: list[int] = inputs["input_ids"][0].tolist()
        gen_config.max_new_tokens = min(gen_config.max_new_tokens, self._room(model, len(prompt)))
        stops, gen_config.stop_strings = gen_config.stop_strings or [], None
        stream = Stream(processor, [stops] if isinstance(stops, str) else stops, response_parser)
        if self.batches is not None:
            self.batches.start(prompt, gen_config, stream)
        else:
            self._start(model, prompt, gen_config, stream)
        return stream.queue, stream

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        """A generation's text, the number of tokens of its prompt, and the new tokens."""
        queue, stream = self.generate_streaming(model, processor, inputs, gen_config, request_id)
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, _StreamError):
                    raise HTTPException(500, item.msg)
        except asyncio.CancelledError:
            stream.cancel()
            raise
        # A stream leaves out what is not yet, or never, a character.
        whole = processor.decode(stream.tokens, skip_special_tokens=True)
        text = stream.text if stream.stopped else whole
        return text, inputs["input_ids"].shape[-1], stream.tokens

    def is_alive(self) -> bool:
        return self.batches is None or self.batches.is_alive()

    def stop(self) -> None:
        """Nothing is left to do: its threads end with the process."""

    def _room(self, model: Any, length: int) -> int:
        """How many tokens there may be after a prompt of `length` tokens."""
        limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None)]
        if self.batches is not None:
            limits.append(self.batches.tokens)
        most = min((limit for limit in limits if limit), default=sys.maxsize)
        if length == 0:
            raise HTTPException(400, "the prompt is empty")
        if length >= most:
            raise HTTPException(
                400, f"the prompt has {length} tokens, and {most} are there for it and its answer"
            )
        return most - length

    def _start(self, model: Any, prompt: list[int], gen_config: Any, stream: Stream) -> None:
        sampling(model, gen_config)  # what cannot be done is not queued
        ids = torch.tensor([prompt], device=model.device)

        def work() -> None:
            if (seed := getattr(gen_config, "seed", None)) is not None:
                torch.manual_seed(seed)  # nothing else draws meanwhile
            try:
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=gen_config,
                    streamer=stream,
                )
            except _GenerationCancelled:
                stream.end()
            except Exception as error:  # noqa: BLE001 - whatever it is, the client learns of it
                stream.fail(error)

        self.thread.submit(work)
