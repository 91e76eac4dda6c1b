"""A transformers model behind the API: requests batched, or answered one after the other.

On a CPU, requests are batched (besa.serve.transformers.batching) if the model's attention allows
it. Both ways choose tokens by besa.serve.api.sampling.
"""

from __future__ import annotations

import copy
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, LogitsProcessor, LogitsProcessorList

from besa.serve.api.backend import GenerationRequest, TokenStream
from besa.serve.api.sampling import Sampling
from besa.serve.transformers.batching import Batches, attention_can_be_paged

# A model without positions has no end of its context: so many tokens are more than anyone asks for.
_ENDLESS = 1 << 20


class TransformersBackend:
    """A model that generates.

    Args:
        batches: what batches requests; None to answer one after the other.
        compiled: whether `generate` compiles the model.
    """

    def __init__(self, model: Any, batches: Batches | None, compiled: bool = False) -> None:
        self.model, self.batches = model, batches
        text = model.config.get_text_config()
        self.vocabulary: int = text.vocab_size
        longest: int = getattr(text, "max_position_embeddings", None) or _ENDLESS
        self.longest = longest if batches is None else min(longest, batches.tokens)
        ends = model.generation_config.eos_token_id
        self.ends = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self._own = _own_processors(model)
        self._runner = OneByOne(model, compiled) if batches is None else batches

    @property
    def failed(self) -> str | None:
        return None if self.batches is None else self.batches.failed

    def start(self, request: GenerationRequest) -> TokenStream:
        """Has a prompt continued; to be called in an event loop."""
        sampling = Sampling.of(request, self.ends, self.model.device, self._own)
        ends = self.ends | request.stop_token_ids
        return self._runner.start(request.prompt, request.max_tokens, ends, sampling)


def batches_for(model: Any, config: ContinuousBatchingConfig | None) -> Batches | None:
    """What batches requests; None where the model cannot be run so, which is said once."""
    try:
        if attention_can_be_paged(model):
            return Batches(model, config)
        reason = f"{type(model).__name__}'s attention cannot be paged"
    except Exception as error:  # noqa: BLE001 - of many kinds, and all for the same reason
        reason = str(error).split("\n")[0]
    print(f"requests are answered one after the other: {reason}", file=sys.stderr)
    return None


def _own_processors(model: Any) -> list[Any]:
    """What the model's generation configuration asks for beyond what a request may say."""
    config = copy.deepcopy(model.generation_config)
    config.do_sample, config.repetition_penalty, config._eos_token_tensor = False, None, None
    config.min_length = config.min_new_tokens = config.num_beams = None
    return list(model._get_logits_processor(config))


class _Cancelled(Exception):
    """Nobody waits for what `generate` makes."""


class OneByOne:
    """`generate`, one request after the other, in a thread of its own."""

    def __init__(self, model: Any, compiled: bool) -> None:
        self._model, self._compiled = model, compiled
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def start(
        self, prompt: list[int], most: int, ends: frozenset[int], sampling: Sampling
    ) -> TokenStream:
        stream = TokenStream()
        self._work.put(lambda: self._generate(prompt, most, ends, sampling, stream))
        return stream

    def _run(self) -> None:
        while True:
            self._work.get()()

    def _generate(
        self,
        prompt: list[int],
        most: int,
        ends: frozenset[int],
        sampling: Sampling,
        stream: TokenStream,
    ) -> None:
        if stream.is_cancelled:
            return
        config = copy.deepcopy(self._model.generation_config)
        config.do_sample, config.repetition_penalty = False, None  # `Choosing` does what is asked
        config.max_length = config.min_length = config.min_new_tokens = None
        config.max_new_tokens, config.eos_token_id = most, sorted(ends) or None
        if self._compiled and config.cache_implementation is None:
            config.cache_implementation = "static"
        ids = torch.tensor([prompt], device=self._model.device)
        try:
            self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                logits_processor=LogitsProcessorList(
                    [] if sampling.is_plain else [Choosing(sampling)]
                ),
                streamer=_Streamer(stream, sampling),
            )
        except _Cancelled:
            stream.end()
        except Exception as error:  # noqa: BLE001 - whatever it is, the client learns of it
            stream.fail(error)
        else:
            stream.end()


class Choosing(LogitsProcessor):  # type: ignore[misc]
    """Leaves the token that `sampling` chooses as the only one, for a greedy `generate`."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self._sampling.choose(input_ids, scores)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)


class _Streamer:
    """What `generate` tells of each token; its first call has the prompt."""

    def __init__(self, stream: TokenStream, sampling: Sampling) -> None:
        self._stream, self._sampling, self._begun = stream, sampling, False

    def put(self, tokens: Tensor) -> None:
        if self._stream.is_cancelled:
            raise _Cancelled
        if self._begun:
            self._stream.put(tokens.flatten().tolist(), self._sampling.likelihoods[-1:])
        self._begun = True

    def end(self) -> None:
        """`generate` returns next, which says the same."""
