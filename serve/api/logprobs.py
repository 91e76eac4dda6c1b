"""Log probabilities of an answer's tokens, as the two endpoints have them.

>>> from transformers import AutoTokenizer
>>> tokenizer = AutoTokenizer.from_pretrained("path/to/sparse")
>>> y, n = tokenizer("y")["input_ids"][0], tokenizer("n")["input_ids"][0]
>>> found = for_completion(tokenizer, [Likelihood(n, -1.5, [(y, -0.5)])], before=0)
>>> found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset
(['n'], [-1.5], [{'y': -0.5, 'n': -1.5}], [0])

They are the model's own, before temperature, penalties and biases, as vLLM's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from besa.serve.api.answers import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TokenLogprob
from besa.serve.api.backend import Likelihood

# JSON has no infinity; vLLM's word for it.
_LEAST = -9999.0
_NO_CHARACTER = "\ufffd"


def for_chat(tokenizer: Any, likelihoods: Sequence[Likelihood]) -> ChatLogprobs:
    """Of a chat's answer, or of what a chunk adds to it."""
    content = []
    for each in likelihoods:
        top = [_told(tokenizer, token, logprob) for token, logprob in each.top]
        chosen = _told(tokenizer, each.token, each.logprob)
        content.append(ChatTokenLogprob(**chosen.model_dump(), top_logprobs=top))
    return ChatLogprobs(content=content, refusal=None)


def for_completion(
    tokenizer: Any, likelihoods: Sequence[Likelihood], before: int
) -> CompletionLogprobs:
    """Of a completion, or of what a chunk adds to it.

    Args:
        before: letters of the tokens before these.
    """
    tokens = [text_of(tokenizer, each.token) for each in likelihoods]
    tops: list[dict[str, float]] = []
    for text, each in zip(tokens, likelihoods, strict=True):
        top: dict[str, float] = {}
        for token, logprob in each.top:  # where two have one text, the likelier counts
            top.setdefault(text_of(tokenizer, token), max(logprob, _LEAST))
        tops.append({**top, text: max(each.logprob, _LEAST)})
    return CompletionLogprobs(
        tokens=tokens,
        token_logprobs=[max(each.logprob, _LEAST) for each in likelihoods],
        top_logprobs=tops,
        text_offset=list(accumulate(map(len, tokens[:-1]), initial=before)) if tokens else [],
    )


def text_of(tokenizer: Any, token: int) -> str:
    """A token's text as it is behind another: tokenizers drop the space that a text begins with."""
    once, twice = (
        tokenizer.decode([token] * times, clean_up_tokenization_spaces=False) for times in (1, 2)
    )
    return str(twice[len(once) :])


def _told(tokenizer: Any, token: int, logprob: float) -> TokenLogprob:
    text = text_of(tokenizer, token)
    # A part of a character has bytes that its text does not tell.
    told = None if _NO_CHARACTER in text else list(text.encode())
    return TokenLogprob(token=text, logprob=max(logprob, _LEAST), bytes=told)
