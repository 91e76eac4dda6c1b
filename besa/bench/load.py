"""Loads: how many requests, how fast, and which ones; the same for every contender.

>>> Load("concurrency", 4).name, Load("rate", 0.5).name
('4 at a time', '0.5 requests/s')
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from besa.errors import BesaError

_WORDS = "time year people way day man thing woman life child world school state family group"


@dataclass(frozen=True)
class Load:
    """So many requests at a time (closed loop), or so many each second (open, Poisson)."""

    kind: str  # "concurrency" or "rate"
    value: float

    @property
    def name(self) -> str:
        if self.kind == "rate":
            return f"{self.value:.4g} requests/s"
        return "1 at a time" if self.value == 1 else f"{self.value:g} at a time"

    def requests(self, least: int) -> int:
        """How many requests a measurement has: everyone in a closed loop gets some turns."""
        return max(least, 4 * int(self.value)) if self.kind == "concurrency" else least


class Prompts:
    """Prompts by round and load, none of them twice: an engine may remember what it has read.

    Args:
        tokenizer: of transformers; None counts words instead of tokens.
        input_length: tokens of a prompt.
        texts: the prompts to take instead of synthetic ones, from the first again after the last.
    """

    def __init__(
        self, tokenizer: Any, input_length: int, seed: int, texts: Sequence[str] = ()
    ) -> None:
        self.tokenizer, self.length, self.seed, self.texts = tokenizer, input_length, seed, texts
        self._taken = 0

    def take(self, count: int, key: str) -> list[str]:
        """So many prompts; the same ones for the same key, if they are synthetic."""
        if self.texts:
            found = [self.texts[(self._taken + i) % len(self.texts)] for i in range(count)]
            self._taken += count
            return found
        source = random.Random(f"{self.seed} {key}")
        return [self._synthetic(source) for _ in range(count)]

    def _synthetic(self, source: random.Random) -> str:
        words = _WORDS.split()
        if self.tokenizer is None:
            return " ".join(source.choice(words) for _ in range(self.length))
        text = ""
        ids: list[int] = []
        while len(ids) < self.length:  # words are cut into pieces, whichever way
            text += "".join(f" {source.choice(words)}" for _ in range(self.length))
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        special = self.tokenizer.num_special_tokens_to_add()
        kept = ids[: max(1, self.length - special)]
        return str(self.tokenizer.decode(kept, skip_special_tokens=True))


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: .jsonl with a field "prompt" or "text", else a prompt a line.

    Raises:
        BesaError: it cannot be read, or has none.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BesaError(f"--prompts {path} cannot be read: {error}") from None
    if path.suffix == ".jsonl":
        found = []
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                found.append(str(entry["prompt"] if "prompt" in entry else entry["text"]))
            except (ValueError, KeyError, TypeError):
                raise BesaError(
                    f'{path}, line {number} is no JSON object with a "prompt" or a "text"'
                ) from None
        lines = found
    if not lines:
        raise BesaError(f"--prompts {path} has no prompt")
    return lines
