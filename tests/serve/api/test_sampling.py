"""`Sampling`: the next token by transformers' processors, against plain arithmetic."""

from __future__ import annotations

import math
import re
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from besa.serve.api.backend import GenerationRequest
from besa.serve.api.grammar import Grammars
from besa.serve.api.sampling import Sampling

PROMPT = [1, 1, 2]
SCORES = [0.5, 2.0, 1.5, -1.0, 0.0, 1.0]


def scores(answer: list[int] = (), **asked: Any) -> list[float]:  # type: ignore[assignment]
    """The scores after what a request asks for, when it has this answer so far."""
    sampling = Sampling.of(GenerationRequest(PROMPT, 8, **asked), ends=frozenset({1}))
    tokens = torch.tensor([[*PROMPT, *answer]])
    found: list[float] = sampling.processors(tokens, torch.tensor([SCORES]))[0].tolist()
    return found


def test_penalties_are_openais():
    """Off for each time, and once; the prompt does not count."""
    answer = [2, 2, 4]
    counts = Counter(answer)
    expected = [
        score - 0.5 * counts[token] - 0.25 * (counts[token] > 0)
        for token, score in enumerate(SCORES)
    ]
    found = scores(answer, temperature=0, frequency_penalty=0.5, presence_penalty=0.25)
    assert found == pytest.approx(expected)
    assert scores([], temperature=0, frequency_penalty=2) == SCORES
    rewarded = scores(answer, temperature=0, frequency_penalty=-2)
    assert rewarded[2] == pytest.approx(SCORES[2] + 4)


def test_a_repetition_counts_prompt_and_answer():
    found = scores([3], temperature=0, repetition_penalty=2)
    assert found == pytest.approx([0.5, 1.0, 0.75, -2.0, 0.0, 1.0])


def test_biases():
    found = scores(temperature=0, logit_bias={4: 100.0, 0: -1.5})
    assert found == pytest.approx([-1.0, 2.0, 1.5, -1.0, 100.0, 1.0])


def test_no_end_before_the_least_tokens():
    assert scores([4], temperature=0, min_tokens=2)[1] == -torch.inf
    assert scores([4, 4], temperature=0, min_tokens=2)[1] == SCORES[1]


def test_no_end_at_all_but_for_stop_tokens():
    """Which come after the least tokens, too."""
    asked: dict[str, Any] = {"temperature": 0, "stop_token_ids": frozenset({5}), "min_tokens": 2}
    found = scores([4], ignore_eos=True, **asked)
    assert (found[1], found[5]) == (-torch.inf, -torch.inf)
    found = scores([4, 4], ignore_eos=True, **asked)
    assert (found[1], found[5]) == (-torch.inf, SCORES[5])
    assert scores([4, 4], **asked) == SCORES


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_the_models_own(temperature: float):
    """Whatever becomes of the scores, and of every token in turn."""
    asked = GenerationRequest(
        PROMPT, 8, temperature=temperature, logit_bias={3: 100.0}, logprobs=2, seed=0
    )
    sampling = Sampling.of(asked, ends=frozenset())
    assert not sampling.is_plain
    for _ in range(2):
        sampling.choose(torch.tensor([PROMPT]), torch.tensor([SCORES]))
    total = math.log(sum(map(math.exp, SCORES)))
    for found in sampling.likelihoods:
        assert found.token == 3
        assert found.logprob == pytest.approx(-1.0 - total)
        assert [token for token, _ in found.top] == [1, 2]
        assert [value for _, value in found.top] == pytest.approx([2.0 - total, 1.5 - total])
    assert deepcopy(sampling).likelihoods is sampling.likelihoods


@pytest.mark.parametrize("asked", [{"temperature": 0.0}, {"top_k": 1}, {"seed": 3}])
def test_a_grammar_holds_however_tokens_are_chosen(tiny_model: Path, asked: dict[str, Any]):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    grammar = Grammars(tokenizer, 257, {0}).compiled("regex", "[ab]{2}c?")
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):  # the second answer begins anew
        sampling = Sampling.of(GenerationRequest([7], 8, grammar=grammar, **asked), frozenset({0}))
        tokens = [7]
        while tokens[-1] != 0:
            scores = torch.randn(1, 257, generator=generator)
            tokens.append(int(sampling.choose(torch.tensor([tokens]), scores)))
        assert re.fullmatch("[ab]{2}c?", tokenizer.decode(tokens[1:-1]))


def test_what_is_drawn_from():
    assert [score > -torch.inf for score in scores(top_k=2)] == [0, 1, 1, 0, 0, 0]
    assert [score > -torch.inf for score in scores(top_p=1e-6)] == [0, 1, 0, 0, 0, 0]
    assert [score > -torch.inf for score in scores(min_p=0.3)] == [0, 1, 1, 0, 0, 1]
    assert scores(temperature=0.5) == pytest.approx([2 * score for score in SCORES])


def test_the_likeliest_whatever_else_is_asked():
    asked = GenerationRequest(PROMPT, 8, temperature=0, top_p=0.1, top_k=3, min_p=0.9, seed=1)
    sampling = Sampling.of(asked, ends=frozenset())
    assert sampling.is_plain
    tokens, row = torch.tensor([PROMPT]), torch.tensor([SCORES])
    assert sampling.choose(tokens, row).tolist() == [1]


def test_by_chance():
    """As often as their probabilities say, the same with the same seed, at any temperature."""

    def drawn(seed: int, temperature: float, number: int = 400) -> list[int]:
        asked = GenerationRequest(PROMPT, 8, temperature=temperature, seed=seed)
        sampling = Sampling.of(asked, ends=frozenset())
        tokens, row = torch.tensor([PROMPT]), torch.tensor([SCORES])
        return [int(sampling.choose(tokens, row)) for _ in range(number)]

    assert drawn(1, 1.0) == drawn(1, 1.0) != drawn(2, 1.0)
    shares = torch.tensor(SCORES).softmax(-1)
    found = torch.tensor(drawn(3, 1.0)).bincount(minlength=6) / 400
    assert (found - shares).abs().max() < 0.1
    assert set(drawn(4, 1e-30)) == {1}
    assert len(set(drawn(5, 100.0))) == 6
