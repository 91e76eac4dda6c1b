"""How the next token is chosen from a model's scores, as one request asks.

>>> asked = GenerationRequest([1], 8, temperature=0, logprobs=1)
>>> sampling = Sampling.of(asked, ends=frozenset({0}))
>>> sampling.choose(torch.tensor([[1, 5]]), torch.tensor([[0.1, 0.7, 0.2]]))
tensor([1])
>>> [likelihood.top[0][0] for likelihood in sampling.likelihoods]
[1]

The steps are transformers' own processors where it has them, in vLLM's order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from besa.serve.api.backend import GenerationRequest, Likelihood
from besa.serve.api.grammar import GrammarMask


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are chosen.

    Attributes:
        processors: change scores, given all tokens so far.
        sample: whether by chance; else the largest score wins.
        generator: of chance; None for the one that all share.
        grammar: the one of the processors that has to know what was chosen.
        logprobs: how many of the likeliest tokens are noted with each; None to note none.
        likelihoods: of the tokens chosen so far, if they are noted.
    """

    processors: LogitsProcessorList
    sample: bool
    generator: torch.Generator | None
    grammar: GrammarMask | None = None
    logprobs: int | None = None
    likelihoods: list[Likelihood] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        asked: GenerationRequest,
        ends: frozenset[int],
        device: torch.device | str = "cpu",
        model: Iterable[Any] = (),
    ) -> Sampling:
        """What a request says.

        Args:
            ends: tokens that end a text of the model's.
            model: processors that the model's own generation configuration asks for.
        """
        sample = asked.temperature > 0
        grammar = asked.grammar.start() if asked.grammar is not None else None
        steps = [*model, *_scores(asked, ends, device), *([grammar] if grammar else [])]
        steps += _chances(asked) if sample else []
        generator = None
        if sample and asked.seed is not None:
            generator = torch.Generator(device).manual_seed(asked.seed)
        return cls(LogitsProcessorList(steps), sample, generator, grammar, asked.logprobs)

    def __deepcopy__(self, _: dict[int, Any]) -> Sampling:
        """Itself: an answer that a full batch puts off and begins again goes on with it."""
        return self

    @property
    def is_plain(self) -> bool:
        """Whether it takes the largest of the scores as they are, and notes nothing."""
        return not (self.processors or self.sample or self.logprobs is not None)

    def choose(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """The next token.

        Args:
            tokens: [1, length], prompt and answer so far.
            scores: [1, vocabulary].

        Returns:
            [1].
        """
        scores = scores.float()
        changed = self.processors(tokens, scores)
        if self.sample:
            chosen = torch.multinomial(changed.softmax(-1), 1, generator=self.generator)[:, 0]
        else:
            chosen = changed.argmax(-1)
        if self.grammar is not None:
            self.grammar.took(int(chosen))
        if self.logprobs is not None:
            self.likelihoods.append(likelihood_of(int(chosen), scores[0], self.logprobs))
        return chosen


def likelihood_of(token: int, scores: Tensor, most: int) -> Likelihood:
    """How likely a token is, by the model's scores [vocabulary] as they are, as vLLM has it."""
    logprobs = scores.log_softmax(-1)
    values, tokens = logprobs.topk(min(most, len(scores)))
    return Likelihood(
        token, float(logprobs[token]), list(zip(tokens.tolist(), values.tolist(), strict=True))
    )


def _scores(
    asked: GenerationRequest, ends: frozenset[int], device: torch.device | str
) -> list[LogitsProcessor]:
    """What makes tokens likelier or not, however they are chosen."""
    steps: list[LogitsProcessor] = []
    length = len(asked.prompt)
    if asked.logit_bias:
        biases = {(token,): bias for token, bias in asked.logit_bias.items()}
        steps.append(SequenceBiasLogitsProcessor(biases))
    least = asked.max_tokens if asked.ignore_eos else asked.min_tokens
    for tokens, until in ((ends, least), (asked.stop_token_ids, asked.min_tokens)):
        if tokens and until:
            steps.append(MinNewTokensLengthLogitsProcessor(length, until, sorted(tokens), device))
    if asked.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(float(asked.repetition_penalty)))
    if asked.frequency_penalty or asked.presence_penalty:
        steps.append(AnswerPenalty(length, asked.frequency_penalty, asked.presence_penalty))
    return steps


def _chances(asked: GenerationRequest) -> list[LogitsProcessor]:
    """What the scores are drawn by."""
    steps: list[LogitsProcessor] = []
    if asked.temperature != 1:
        # A temperature below it would make infinite scores.
        steps.append(TemperatureLogitsWarper(max(float(asked.temperature), 1e-5)))
    if asked.top_k:
        steps.append(TopKLogitsWarper(asked.top_k))
    if asked.top_p < 1:
        steps.append(TopPLogitsWarper(float(asked.top_p)))
    if asked.min_p:
        steps.append(MinPLogitsWarper(float(asked.min_p)))
    return steps


class AnswerPenalty(LogitsProcessor):  # type: ignore[misc]
    """OpenAI's penalties: off the scores of tokens that the answer has, once and for each time.

    https://platform.openai.com/docs/api-reference/completions/create: the prompt does not count.
    """

    def __init__(self, prompt_length: int, frequency: float, presence: float) -> None:
        self.prompt_length, self.frequency, self.presence = prompt_length, frequency, presence

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        answer = input_ids[:, self.prompt_length :]
        counts = torch.zeros_like(scores).scatter_add(
            1, answer, torch.ones_like(answer, dtype=scores.dtype)
        )
        return scores - self.frequency * counts - self.presence * (counts > 0)
