"""What follows from the rounds of all contenders: spreads, quantiles, gains over the reference.

>>> from besa.bench.figures import OFFLINE
>>> dense = [{"step": 2.0, "decode_tps": 0.5}] * 5
>>> sparse = [{"step": 1.0, "decode_tps": 1.0}] * 5
>>> summary(dense)["step"].median
2.0
>>> {name: gain.median for name, gain in gains(sparse, dense, OFFLINE).items()}
{'step': 2.0, 'decode_tps': 2.0}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from besa.bench.figures import THROUGHPUT
from besa.bench.results import QUANTILES, Gains, Measurement
from besa.bench.statistics import Spread, gain, percentile, spread

Rounds = Sequence[Mapping[str, float]]  # every round's figures by name


def summary(rounds: Rounds) -> dict[str, Spread]:
    """The spread over the rounds of each figure that all of them have."""
    return {
        name: spread([one[name] for one in rounds])
        for name in rounds[0]
        if all(name in one for one in rounds)
    }


def quantiles(values: Sequence[float]) -> tuple[float, ...]:
    """At the shares of `QUANTILES`; empty without values."""
    return tuple(percentile(values, share) for share in QUANTILES) if values else ()


def gains(rounds: Rounds, reference: Rounds, figures: Mapping[str, bool]) -> Gains:
    """The gain of each figure that all rounds have, paired by round.

    Args:
        figures: names, and whether more of each is better.
    """
    return {
        name: gain([r[name] for r in rounds], [r[name] for r in reference], higher)
        for name, higher in figures.items()
        if all(name in one for one in (*rounds, *reference))
    }


def comparisons(
    measurements: Sequence[Measurement],
    references: Mapping[str, str],
    figures: Mapping[str, bool],
    paced: Collection[str] = (),
) -> dict[str, dict[str, Gains]]:
    """The gains by contender, load and figure.

    Args:
        references: the contender that each one is compared with, by name; those that are compared
            with themselves, or with none, are left out.
        paced: the loads at a given rate, whose throughput is what was asked for and so no gain.
    """
    rounds = {(m.contender, m.load): m.rounds for m in measurements}
    own_pace = {name: higher for name, higher in figures.items() if name not in THROUGHPUT}
    found: dict[str, dict[str, Gains]] = {}
    for (name, load), own in rounds.items():
        reference = rounds.get((references.get(name, name), load))
        if references.get(name, name) != name and reference is not None:
            chosen = own_pace if load in paced else figures
            found.setdefault(name, {})[load] = gains(own, reference, chosen)
    return found
