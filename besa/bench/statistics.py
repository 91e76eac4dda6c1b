"""What repeated measurements say: medians, their spread, paired ratios, and whether they differ.

This is the one statistic of besa's results and of its README. Contenders take turns, so that round
i of one is paired with round i of the other: what the machine did in that round falls out of their
ratio. The median of n ratios lies between the k-th smallest and the k-th largest with confidence
1 − 2·P(B < k), B ~ Binomial(n, ½), whatever the distribution (the interval behind the sign test).
With five rounds the extremes hold it with 94%.

>>> seconds = compare([10.0, 11.0, 12.0, 10.0, 12.0], [5.0, 5.0, 6.0, 5.0, 6.0])
>>> seconds.median, seconds.low, seconds.high, seconds.verdict(higher_is_better=False)
(2.0, 2.0, 2.2, 'worse')
>>> faster = gain([5.0, 5.0, 6.0, 5.0, 6.0], [10.0, 11.0, 12.0, 10.0, 12.0], higher_is_better=False)
>>> faster.median, faster.verdict
(2.0, 'better')
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from besa.typed_json import ABSENT_IF_DEFAULT

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


@dataclass(frozen=True)
class Gain:
    """How many times better than the reference a contender is: above 1 it is better.

    Attributes:
        median, low, high, rounds, confidence: as of `Spread`; a gain that follows from two
            brackets instead of rounds has neither rounds nor confidence.
        verdict: "better", "worse", "no difference"; None for too few rounds.
    """

    median: float
    low: float
    high: float
    rounds: int | None = field(default=None, metadata=ABSENT_IF_DEFAULT)
    confidence: float | None = field(default=None, metadata=ABSENT_IF_DEFAULT)
    verdict: str | None = None


def gain(values: Sequence[float], reference: Sequence[float], higher_is_better: bool) -> Gain:
    """By how much a contender's rounds are better than the reference's, round by round."""
    ratio = compare(values, reference) if higher_is_better else compare(reference, values)
    return Gain(
        median=ratio.median,
        low=ratio.low,
        high=ratio.high,
        rounds=ratio.rounds,
        confidence=ratio.confidence,
        verdict=ratio.verdict(higher_is_better=True),
    )


def bracket_gain(own: tuple[float, float], reference: tuple[float, float]) -> Gain | None:
    """The gain of a rate that is only known to lie between two, over another such rate.

    Args:
        own, reference: the highest rate that held and the lowest that did not; 0 and infinity
            where there is none, and then there is no gain.
    """
    (low, high), (other_low, other_high) = own, reference
    if not low or not other_low or not math.isfinite(high) or not math.isfinite(other_high):
        return None
    least, most = low / other_high, high / other_low
    verdict = NO_DIFFERENCE if least <= 1 <= most else "better" if least > 1 else "worse"
    return Gain(low / other_low, least, most, verdict=verdict)


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
