"""What repeated measurements say: medians, their spread, paired ratios, and whether they differ.

Contenders take turns, so that round i of one is paired with round i of the other: what the machine
did in that round falls out of their ratio. The median of n ratios lies between the k-th smallest
and the k-th largest with confidence 1 − 2·P(B < k), B ~ Binomial(n, ½), whatever the distribution
(the interval behind the sign test). With five rounds the extremes hold it with 94%.

>>> ratio = compare([10.0, 11.0, 12.0, 10.0, 12.0], [5.0, 5.0, 6.0, 5.0, 6.0])
>>> ratio.median, ratio.low, ratio.high, ratio.verdict(higher_is_better=True)
(2.0, 2.0, 2.2, 'better')
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
ENOUGH = 0.9  # for a verdict
ENOUGH_ROUNDS = 5  # which give 0.94
NO_DIFFERENCE = "no difference"


@dataclass(frozen=True)
class Spread:
    """A median of repeated measurements and the interval that holds it.

    Attributes:
        median: of all rounds.
        low, high: the ends of the interval; the extremes where there are few rounds.
        rounds: how many measurements there were.
        confidence: how sure it is that the interval holds the true median; 0 for one round.
    """

    median: float
    low: float
    high: float
    rounds: int
    confidence: float

    def verdict(self, higher_is_better: bool) -> str | None:
        """Of a ratio: "better", "worse" or "no difference".

        None for too few rounds: that two or three of them agree happens by chance.
        """
        if self.rounds > 1 and self.low <= 1 <= self.high:
            return NO_DIFFERENCE
        if self.confidence < ENOUGH:
            return None
        return "better" if (self.low > 1) == higher_is_better else "worse"


def spread(values: Sequence[float]) -> Spread:
    """The median of at least one value, and its interval."""
    ordered = sorted(values)
    n = len(ordered)
    k = _rank(n)
    return Spread(
        median=statistics.median(ordered),
        low=ordered[k - 1],
        high=ordered[n - k],
        rounds=n,
        confidence=coverage(n, k),
    )


def coverage(n: int, k: int) -> float:
    """How sure the k-th smallest and k-th largest of n values hold the median between them."""
    return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n


def _rank(n: int) -> int:
    """The largest k that still gives the confidence; 1, the extremes, where none does."""
    fitting = [k for k in range(1, (n + 1) // 2 + 1) if coverage(n, k) >= CONFIDENCE]
    return max(fitting, default=1)


def compare(values: Sequence[float], reference: Sequence[float]) -> Spread:
    """The ratios of a contender's rounds to the reference's, round by round.

    Args:
        values: a figure in each round.
        reference: the same of the other contender, in the same rounds; positive.
    """
    return spread([a / b for a, b in zip(values, reference, strict=True)])


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest values, as numpy's default.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 0.5)
    2.5
    """
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = min(math.floor(place), len(ordered) - 1)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)
