"""What an answer has to be: JSON of a schema, one of some texts, or what a grammar allows.

>>> from transformers import AutoTokenizer
>>> tokenizer = AutoTokenizer.from_pretrained("path/to/sparse")
>>> grammar = Grammars(tokenizer, vocabulary=2048, ends={0}).compiled("choice", '["yes", "no"]')
>>> mask = grammar.start()
>>> scores = mask(torch.zeros(1, 0), torch.zeros(1, 2048))
>>> sorted({tokenizer.decode([token])[0] for token in scores[0].isfinite().nonzero()[:, 0]})
['n', 'y']

llguidance (https://github.com/guidance-ai/llguidance) knows after each token which ones may come
next; all others lose their scores.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer, grammar_from
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import LogitsProcessor

Kind = Literal["json", "regex", "choice", "grammar"]
# Where blanks may be anywhere, small models put blank after blank, to the end.
_JSON_OPTIONS: Any = {"whitespace_flexible": False}


class GrammarError(Exception):
    """A grammar that cannot be kept; its message is for the client."""


class Grammars:
    """The grammars that a model's answers can be held to.

    Args:
        vocabulary: how many scores the model gives.
        ends: tokens that end a text.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Collection[int]) -> None:
        self._given, self._ends = tokenizer, sorted(ends)
        self._vocabulary = max(vocabulary, len(tokenizer))
        # Programs ask for one form again and again, and a request does so for each of its prompts.
        self.compiled = lru_cache(maxsize=16)(self._compiled)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        """llguidance's, which takes up to a second to make."""
        return from_tokenizer(self._given, self._vocabulary, self._ends)

    def _compiled(self, kind: Kind, text: str) -> Grammar:
        """A grammar.

        Args:
            kind: what `text` is: a JSON schema, a regular expression, a JSON list of texts, or a
                grammar in Lark's or llama.cpp's notation.

        Raises:
            GrammarError: it is none, or has what llguidance does not know.
        """
        if not self._ends:
            raise GrammarError("the model has no token that ends a text")
        try:
            if kind == "json":
                found = LLMatcher.grammar_from_json_schema(text, defaults=_JSON_OPTIONS)
            else:
                found = grammar_from(kind, text)
            matcher = LLMatcher(self._tokenizer, found, log_level=0)
        except ValueError as error:  # its own, and of tokenizers that are not fast
            raise GrammarError(_first_line(str(error))) from None
        if matcher.is_error():
            raise GrammarError(_first_line(matcher.get_error()))
        return Grammar(matcher)


class Grammar:
    """What one request's answers are held to."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def start(self) -> GrammarMask:
        """For one answer, from its first token on."""
        return GrammarMask(self._matcher.deep_copy())


class GrammarMask(LogitsProcessor):  # type: ignore[misc]
    """Takes the scores of tokens that may not come next; once all has come, only ends may."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        """Scores [1, vocabulary]."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: scores.shape[1]])
        return scores.masked_fill(~allowed.bool().to(scores.device), -torch.inf)

    def took(self, token: int) -> None:
        """This is the next token."""
        self._matcher.consume_token(token)


def _first_line(text: str) -> str:
    return (text.splitlines() or [""])[0]
