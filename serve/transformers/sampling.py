"""How the next token is chosen from a model's scores, as one request asks.

>>> sampling = Sampling.of(GenerationRequest([1], 8, temperature=0), ends=frozenset({0}))
>>> sampling.choose(torch.tensor([[1, 5]]), torch.tensor([[0.1, 0.7, 0.2]]))
tensor([1])

The steps are transformers' own processors where it has them, in vLLM's order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
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

from besa.serve.api.backend import GenerationRequest


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen.

    Attributes:
        processors: change scores, given all tokens so far.
        sample: whether by chance; else the largest score wins.
        generator: of chance; None for the one that all share.
    """

    processors: LogitsProcessorList
    sample: bool
    generator: torch.Generator | None

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
            ends: tokens that `min_tokens` keeps away.
            model: processors that the model's own generation configuration asks for.
        """
        sample = asked.temperature > 0
        steps = [*model, *_scores(asked, ends, device), *(_chances(asked) if sample else [])]
        generator = None
        if sample and asked.seed is not None:
            generator = torch.Generator(device).manual_seed(asked.seed)
        return cls(LogitsProcessorList(steps), sample, generator)

    @property
    def is_plain(self) -> bool:
        """Whether it takes the largest of the scores as they are."""
        return not (self.processors or self.sample)

    def choose(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """The next token of each row.

        Args:
            tokens: [rows, length], prompt and answer so far.
            scores: [rows, vocabulary].
        """
        scores = self.processors(tokens, scores.float())
        if not self.sample:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=self.generator)[:, 0]


def _scores(
    asked: GenerationRequest, ends: frozenset[int], device: torch.device | str
) -> list[LogitsProcessor]:
    """What makes tokens likelier or not, however they are chosen."""
    steps: list[LogitsProcessor] = []
    length = len(asked.prompt)
    if asked.logit_bias:
        biases = {(token,): bias for token, bias in asked.logit_bias.items()}
        steps.append(SequenceBiasLogitsProcessor(biases))
    if asked.min_tokens and ends:
        steps.append(
            MinNewTokensLengthLogitsProcessor(length, asked.min_tokens, sorted(ends), device)
        )
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
