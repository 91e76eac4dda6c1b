"""Fixed prompts whose greedy answers may not change: a server that answers otherwise is broken.

>>> answers = Probe(lambda prompt: prompt.upper())
>>> answers.check(turn=1)
>>> answers.agreement(Probe(lambda prompt: prompt.upper() if len(prompt) > 3 else ""))
0.75
"""

from __future__ import annotations

from collections.abc import Callable

from besa.bench.client import BrokenError

# Shorter than a block of any engine's cache, so that a second answer is computed like the first.
PROMPTS = ("The", "One day the", "It is said that", "In the middle of the night")
TOKENS = 12


class Probe:
    """Takes a server's first answers, and compares later ones with them.

    Args:
        ask: gives the server's greedy answer to a prompt.

    Attributes:
        answers: the first ones, to each of `PROMPTS`.
    """

    def __init__(self, ask: Callable[[str], str]) -> None:
        self._ask = ask
        self.answers = [ask(prompt) for prompt in PROMPTS]
        # A cache may change the last bits, and with them a close decision, but only once.
        self._second = [ask(prompt) for prompt in PROMPTS]

    def check(self, turn: int) -> None:
        """Asks one of the prompts again, another one every turn.

        Raises:
            BrokenError: there is no answer, or another one.
        """
        which = turn % len(PROMPTS)
        answer, first = self._ask(PROMPTS[which]), self.answers[which]
        if answer not in (first, self._second[which]):
            raise BrokenError(
                f"answers the same prompt otherwise than before: {PROMPTS[which]!r} by "
                f"{_short(answer)}, not {_short(first)}"
            )

    def agreement(self, other: Probe) -> float:
        """The share of the prompts that another server answered alike."""
        pairs = zip(self.answers, other.answers, strict=True)
        return sum(own == its for own, its in pairs) / len(PROMPTS)


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= 40 else flat[:39] + "…")
