"""What `besa bench` tells of its progress: a step that begins, or a contender that is broken.

>>> print(Step("4 at a time, round 1 of 5: dense"))
4 at a time, round 1 of 5: dense
>>> print(Broken("sparse", "its server ended: out of memory"))
sparse is broken: its server ended: out of memory
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """A step begins; what it is, in a few words."""

    what: str

    def __str__(self) -> str:
        return self.what


@dataclass(frozen=True)
class Broken:
    """A contender turned out to be broken and is not asked again."""

    contender: str
    reason: str

    def __str__(self) -> str:
        return f"{self.contender} is broken: {self.reason}"


Event = Step | Broken
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """For callers that show no progress."""
