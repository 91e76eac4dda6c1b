"""Bytes by what they are for, and the moment of a run at which they are most.

>>> moments = [Moment("load", {"weights": 10}), Moment("learn", {"weights": 10, "optimizer": 25})]
>>> peak_of(moments).total
35
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Moment:
    """What is in memory at some moment of a run.

    Attributes:
        name: what is being done.
        parts: bytes, by what they are for.
    """

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def beside(self, parts: Mapping[str, int]) -> Moment:
        """The same moment, with what is there all the time before it."""
        return Moment(self.name, {**parts, **self.parts})


def peak_of(moments: Sequence[Moment]) -> Moment:
    """The moment with most bytes; the first of several."""
    return max(moments, key=lambda moment: moment.total)
