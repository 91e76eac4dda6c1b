"""Continuous batching on a CPU: requests join and leave a running batch token by token.

A server makes one `Batches` for its model, and calls its `start` for each request, in an event
loop.

The batching is transformers' own, paged attention and all, with what it needs on a CPU and in a
server: a cache of a size that fits; sampling as each request asks (transformers gives all of them
what the first one asked for); and requests that end when their client, or a stop string, says so.

A packed model of 12 blocks, 1024 wide, on two cores, 24 new tokens for each prompt, in seconds:

    prompts      one after the other    batched
    1 × 200      2.9                    3.0
    8 × 200      22.9                   7.5
    1 × 1000     3.6                    3.9
    8 × 1000     38.9                   45.2

Every query is multiplied with the keys of all sequences, and masked: for many long prompts at a
time, `--no-continuous-batching` is faster.

Models whose attention does not go through transformers' interface would be answered wrongly (MPT,
GPT-Neo) or not at all, and state-space, convolutional and latent layers have no pages.
"""

from __future__ import annotations

import copy
import threading
import uuid
from collections.abc import Collection
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from besa.machine import memory
from besa.serve.api.backend import TokenStream
from besa.serve.api.sampling import Sampling
from besa.serve.cpu import longest_sequence

# A page is of so many tokens: what a sequence wastes at its end is half of it.
_PAGE = 32
# Tokens of prompts that a step takes at most, so that the answers beside them go on.
_STEP = 512
# Of the longest sequences, more than so many at a time gain nothing on a CPU.
_SEQUENCES = 8
# Beyond it, the mask of a step alone (_STEP times as many values) takes 64 MiB.
_MOST_TOKENS = 65536


def attention_can_be_paged(model: Any) -> bool:
    """Whether the model's attention goes through the interface in which it can be replaced."""
    return bool(model._supports_attention_backend)


class Batches:
    """Generates for all requests together, in a thread of its own.

    Attributes:
        tokens: how many a request may have, prompt and answer.

    Raises:
        Exception: of any kind, if the model cannot be run so.
    """

    def __init__(self, model: Any, config: ContinuousBatchingConfig | None = None) -> None:
        self.model = model
        config = copy.deepcopy(config) or ContinuousBatchingConfig(page_size=_PAGE)
        config.max_batch_tokens = config.max_batch_tokens or _STEP
        config.num_blocks = config.num_blocks or cache_tokens(model) // config.page_size
        config.use_cuda_graph = config.use_async_batching = False  # `Sampler` is no graph
        self.tokens = config.num_blocks * config.page_size
        self.manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, use_cache=False, eos_token_id=-1), config
        )
        self.manager.logit_processor = Sampler()
        # A daemon's threads are daemons: this one, too, has to end with the process.
        starter = threading.Thread(target=self.manager.start, daemon=True)
        starter.start()
        starter.join()
        self._generate_once()

    def _generate_once(self) -> None:
        """Generates once: models with layers that cannot be paged fail with their first token."""
        self.manager.add_request([0, 0], max_new_tokens=2, eos_token_id=-1)
        while (result := self.manager.get_result(timeout=1)) is None:
            if (error := self.manager.background_thread_status.fatal_error) is not None:
                raise error
        if result.error is not None:
            raise RuntimeError(result.error)

    @property
    def failed(self) -> str | None:
        """Why no request is answered any more; None if they are."""
        error = self.manager.background_thread_status.fatal_error
        return None if error is None else str(error)

    def start(
        self, prompt: list[int], most: int, ends: Collection[int], sampling: Sampling
    ) -> TokenStream:
        """Has a prompt continued, by so many tokens at most; to be called in an event loop."""
        stream, name = TokenStream(), uuid.uuid4().hex
        told = 0

        def forget() -> None:
            self.manager.output_router.result_handlers.pop(name, None)
            self.manager.cancel_request(name)

        def take(output: Any) -> None:
            nonlocal told
            came = len(output.generated_tokens)
            stream.put(output.generated_tokens[told:], sampling.likelihoods[told:came])
            told = came
            if output.error is not None:
                stream.fail(output.error)
            elif output.is_finished():
                stream.on_cancel = lambda: None
                stream.end()

        stream.on_cancel = forget
        self.manager.register_result_handler(name, take)
        self.manager.add_request(
            prompt,
            request_id=name,
            streaming=True,
            max_new_tokens=most,
            eos_token_id=sorted(ends) or -1,
            sampling=sampling,
        )
        return stream


class Sampler:
    """Samples for each request as it asks, with the methods of transformers' batch processors.

    The batch takes the largest of each row's scores. Where a request asks for another token, that
    token's score is left as the only one.
    """

    do_processing = True
    tensors_required = 0

    def fill_defaults(self, *_: Any) -> None:
        """No tensors are required, so that there is nothing to fill."""

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """They are checked before they come here."""

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: Any) -> Any:
        """Notes which requests the rows of the step's scores are for."""
        self.states = [request.state for request in requests_in_batch if request.has_new_token]
        return arg_storage

    def __call__(self, _ids: torch.Tensor, scores: torch.Tensor, _: Any) -> torch.Tensor:
        """Scores [requests, vocabulary], changed row by row where a request asks for it."""
        for row, state in enumerate(self.states):
            asked: Sampling | None = state.logit_processor_kwargs.get("sampling")
            if asked is None or asked.is_plain:
                continue
            tokens = torch.tensor([state.initial_tokens + state.generated_tokens]).to(scores.device)
            chosen = asked.choose(tokens, scores[row : row + 1])
            scores[row] = -torch.inf
            scores[row, chosen] = 0.0
        return scores


def cache_tokens(model: Any) -> int:
    """How many tokens the cache of a model holds on this machine."""
    return tokens_in_cache(model.config.get_text_config().to_dict(), memory().available)


def tokens_in_cache(config: dict[str, Any], available: int) -> int:
    """How many tokens the cache holds: of a few longest sequences, in a quarter of free memory.

    Args:
        config: of the text model, as in config.json.
        available: bytes of memory that nothing uses.
    """
    longest = config.get("max_position_embeddings") or _MOST_TOKENS
    tokens = min(_SEQUENCES * longest, _MOST_TOKENS)
    if (size := longest_sequence(config)) is not None:
        tokens = min(tokens, available // 4 * longest // size)
    return max(tokens, 2 * _PAGE)
