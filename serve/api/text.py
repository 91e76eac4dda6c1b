"""Tokens become text as they come, up to the first stop string.

>>> from transformers import AutoTokenizer
>>> tokenizer = AutoTokenizer.from_pretrained("path/to/sparse")
>>> text = AnswerText(tokenizer, prompt=[], stops=["!"])
>>> text.extend(tokenizer("Hi! And more")["input_ids"]), text.stopped
('Hi', True)

What may be the beginning of a stop string is kept back until it is known not to be one. The text
of all steps together is what the tokenizer makes of all tokens: `tokenizers.DecodeStream`, which
does the same, never lets go of bytes that do not become a character.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

# Tokens of the prompt that show how the answer's first token is spaced, as many as in vLLM.
_BEFORE = 5
# So many tokens that are no characters yet will not become any.
_MOST_PENDING = 16
_NO_CHARACTER = "\ufffd"


class Detokenizer:
    """Text of tokens, one after the other, behind a prompt."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._tokens = list(prompt[-_BEFORE:])
        # Tokens before `_read` are told. Those from `_begin` on say how the next one is spaced, and
        # `_told` letters of them are known. Half a character at the prompt's end may become whole.
        self._begin, self._read = 0, len(self._tokens)
        self._told = len(self._decode(self._tokens).rstrip(_NO_CHARACTER))

    def step(self, token: int) -> str:
        """The text that a token completes."""
        self._tokens.append(token)
        text = self._untold()
        pending = len(self._tokens) - self._read
        if text and (not text.endswith(_NO_CHARACTER) or pending > _MOST_PENDING):
            self._begin, self._read = self._read, len(self._tokens)
            self._told = len(self._decode(self._tokens[self._begin :]))
            return text
        return ""

    def rest(self) -> str:
        """The text of tokens that no character came of; the last that there is."""
        return self._untold() if self._read < len(self._tokens) else ""

    def _untold(self) -> str:
        return self._decode(self._tokens[self._begin :])[self._told :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(
            tokens, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False
        )
        return text


class AnswerText:
    """The text of one answer.

    Args:
        prompt: what it continues.
        stops: strings that end it, and are not part of it.
        ends: tokens that end it by themselves: they have no text.
        min_tokens: tokens before it may end.

    Attributes:
        tokens: how many came, the last one included.
        stopped: whether it has ended, and no more is wanted.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: Sequence[int],
        stops: Sequence[str] = (),
        ends: Collection[int] = (),
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens)
        self._stops, self._ends, self._min_tokens = stops, ends, min_tokens
        self._held_back = ""
        self.tokens = 0
        self.stopped = False

    def extend(self, tokens: Sequence[int]) -> str:
        """The text that the next tokens add; what comes after a stop is left out."""
        said = ""
        for token in tokens:
            if self.stopped:
                break
            self.tokens += 1
            may_end = self.tokens > self._min_tokens
            if token in self._ends:
                said += self.rest()
                self.stopped = True
                break
            said += self._let_go(self._detokenizer.step(token), self._stops if may_end else ())
        return said

    def rest(self) -> str:
        """What was kept back, once no token comes any more."""
        if self.stopped:
            return ""
        said = self._let_go(self._detokenizer.rest(), self._stops)
        if not self.stopped:
            said, self._held_back = said + self._held_back, ""
        return said

    def _let_go(self, text: str, stops: Sequence[str]) -> str:
        self._held_back += text
        end = first_stop(self._held_back, stops)
        self.stopped = end is not None
        if end is None:
            end = len(self._held_back) - stop_prefix_length(self._held_back, stops)
        said, self._held_back = self._held_back[:end], self._held_back[end:]
        return said


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first stop string begins; None without one."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def stop_prefix_length(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    return max(
        (
            length
            for stop in stops
            for length in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:length])
        ),
        default=0,
    )
