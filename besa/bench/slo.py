"""The highest request rate within a latency objective, found by bisection.

>>> search = RateSearch(start=2.0)
>>> while (rate := search.next()) is not None:
...     search.learn(rate, held=rate < 5)
>>> print(f"it holds at {search.low:.1f}, and no longer at {search.high:.1f} requests a second")
it holds at 4.8, and no longer at 5.2 requests a second

A request is good if its time to first token, its mean time between tokens and its end-to-end
latency are each within the limit that was given. The objective holds at a rate if so large a share
of the requests is good.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from besa.bench.figures import Request

_CLOSE_ENOUGH = 1.1
_MOST_STEPS = 12


def within(requests: Sequence[Request], limits: Mapping[str, float], share: float) -> bool:
    """Whether the objective holds.

    Args:
        requests: at least one.
        limits: seconds by "ttft", "itl", "e2e".
        share: of the requests that have to be good.
    """
    good = sum(_is_good(request, limits) for request in requests)
    return good >= share * len(requests)


def _is_good(request: Request, limits: Mapping[str, float]) -> bool:
    gaps = request.gaps
    seen = {
        "ttft": request.ttft,
        "itl": sum(gaps) / len(gaps) if gaps else 0.0,
        "e2e": request.latency,
    }
    return not request.error and all(seen[name] <= limit for name, limit in limits.items())


@dataclass
class RateSearch:
    """Doubles or halves until the objective's rate is between two others, then halves between.

    Attributes:
        start: the first rate to try.
        low: the highest rate at which it held; 0 if at none.
        high: the lowest at which it did not; infinite if at none.
    """

    start: float
    low: float = 0.0
    high: float = float("inf")
    steps: int = 0

    def next(self) -> float | None:
        """The rate to try next; None when the two are within a tenth of each other."""
        if self.steps >= _MOST_STEPS or self.high <= self.low * _CLOSE_ENOUGH:
            return None
        if self.steps == 0:
            return self.start
        if self.high == float("inf"):
            return self.low * 2
        if self.low == 0:
            return self.high / 2
        return float((self.low * self.high) ** 0.5)

    def learn(self, rate: float, held: bool) -> None:
        """Whether it held at that rate."""
        self.steps += 1
        if held:
            self.low = max(self.low, rate)
        else:
            self.high = min(self.high, rate)
        if self.low > self.high:  # noise: it held above a rate at which it did not
            self.low = self.high
