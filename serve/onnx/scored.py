"""Answers of which we see the scores: GenAI's generator computes them, and `Sampling` chooses.

GenAI's engine batches, and chooses tokens itself. What it does not know (seeds, biases, OpenAI's
penalties, min_p, grammars, log probabilities) is asked for here, one request beside the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from besa.serve.api.backend import GenerationRequest, TokenStream
from besa.serve.api.sampling import Sampling


def needs_scores(asked: GenerationRequest) -> bool:
    """Whether a request asks for what GenAI's engine does not know."""
    by_chance = asked.temperature > 0 and (asked.seed is not None or asked.min_p > 0)
    penalties = asked.frequency_penalty or asked.presence_penalty or asked.logit_bias
    told = asked.grammar is not None or asked.logprobs is not None
    late = asked.stop_token_ids and asked.min_tokens
    return bool(by_chance or penalties or told or late)


class ScoredAnswer:
    """One answer, token by token; all calls have to come from one thread."""

    def __init__(self, asked: GenerationRequest, stream: TokenStream, ends: frozenset[int]) -> None:
        self._asked, self.stream = asked, stream
        self._ends = ends | asked.stop_token_ids
        self._sampling = Sampling.of(asked, ends)
        self._tokens = list(asked.prompt)
        self._generator: Any = None

    def step(self, og: Any, model: Any) -> bool:
        """Hands on the next token; whether it was the last one."""
        if self._generator is None:
            parameters = og.GeneratorParams(model)
            most = len(self._asked.prompt) + self._asked.max_tokens
            parameters.set_search_options(max_length=most, do_sample=False)
            self._generator = og.Generator(model, parameters)
            self._generator.append_tokens(np.array([self._tokens], np.int32))
        else:
            self._generator.append_tokens(np.array([self._tokens[-1:]], np.int32))
        scores = torch.from_numpy(self._generator.get_logits()[:, -1].astype(np.float32))
        token = int(self._sampling.choose(torch.tensor([self._tokens]), scores))
        self._tokens.append(token)
        self.stream.put([token], self._sampling.likelihoods[-1:])
        new = len(self._tokens) - len(self._asked.prompt)
        return token in self._ends or new == self._asked.max_tokens
