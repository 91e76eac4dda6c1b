"""Statistics against brute force, and the objective's search against a server that is a formula."""

from __future__ import annotations

import itertools
import random
import statistics as python

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from besa.bench.figures import Request, figures
from besa.bench.slo import RateSearch, within
from besa.bench.statistics import compare, coverage, percentile, spread


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("count", [1, 2, 5, 100])
def test_percentiles_are_numpys(share: float, count: int) -> None:
    values = [random.Random(count).expovariate(1) for _ in range(count)]
    assert percentile(values, share) == pytest.approx(np.percentile(values, 100 * share))


@pytest.mark.parametrize("n", range(1, 9))
def test_coverage_is_counted(n: int) -> None:
    """Every way in which n values can lie below or above the true median is equally likely."""
    for k in range(1, (n + 1) // 2 + 1):
        held = sum(k <= sum(sides) <= n - k for sides in itertools.product((0, 1), repeat=n))
        assert coverage(n, k) == pytest.approx(held / 2**n)


def test_spread_is_as_narrow_as_its_confidence_allows() -> None:
    five = spread([5, 1, 4, 2, 3])
    assert (five.median, five.low, five.high, five.rounds) == (3, 1, 5, 5)
    assert five.confidence == pytest.approx(0.9375)
    ten = spread(range(1, 11))
    assert (ten.median, ten.low, ten.high) == (5.5, 2, 9)
    assert 0.95 <= ten.confidence < 1


def test_spread_holds_the_median_as_often_as_it_says() -> None:
    source = random.Random(0)
    trials = [spread([source.expovariate(1) for _ in range(9)]) for _ in range(4000)]
    held = sum(trial.low <= 0.693147 <= trial.high for trial in trials) / len(trials)
    assert held == pytest.approx(trials[0].confidence, abs=0.015)


def test_ratios_are_paired() -> None:
    """A machine that gets slower from round to round changes both, and so neither's ratio."""
    drift = [1.0, 1.3, 1.7, 2.2, 2.9]
    dense, sparse = [2.0 * d for d in drift], [1.0 * d for d in drift]
    ratio = compare(dense, sparse)
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
    assert ratio.verdict(higher_is_better=True) == "better"
    assert ratio.verdict(higher_is_better=False) == "worse"
    # The same without pairing would not even tell which one is faster.
    assert min(dense) < max(sparse)


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([1.1, 1.2, 1.1, 1.3, 1.1], "better"),
        ([0.9, 0.8, 0.9, 0.7, 0.9], "worse"),
        ([1.1, 1.2, 0.99, 1.3, 1.1], "no difference"),
        ([1.0] * 5, "no difference"),
        ([1.1, 0.9], "no difference"),
        ([1.1, 1.2, 1.3], None),  # three agree by chance in one of four cases
        ([1.5], None),
    ],
)
def test_verdicts(ratios: list[float], verdict: str | None) -> None:
    assert spread(ratios).verdict(higher_is_better=True) == verdict


def test_figures_of_requests() -> None:
    slow = Request(ttft=0.2, gaps=(0.1, 0.3), latency=0.6, output_tokens=3)
    quick = Request(ttft=0.1, gaps=(0.1,), latency=0.2, output_tokens=2)
    found = figures([slow, quick], duration=0.5)
    assert found["ttft_p50"] == pytest.approx(0.15)
    assert found["itl_p50"] == pytest.approx(python.median([0.1, 0.3, 0.1]))
    assert found["e2e_p99"] == pytest.approx(np.percentile([0.6, 0.2], 99))
    assert found["tpot"] == pytest.approx((0.2 + 0.1) / 2)
    assert found["output_tps"] == 10
    assert found["rps"] == 4


def test_one_token_has_no_gap() -> None:
    found = figures([Request(ttft=0.2, latency=0.2, output_tokens=1)], duration=0.2)
    assert "itl_p50" not in found
    assert "tpot" not in found


def test_within_an_objective() -> None:
    good = Request(ttft=0.1, gaps=(0.01, 0.03), latency=0.14, output_tokens=3)
    late = Request(ttft=0.3, gaps=(0.01, 0.01), latency=0.32, output_tokens=3)
    halting = Request(ttft=0.1, gaps=(0.1, 0.1), latency=0.3, output_tokens=3)
    failed = Request(error="no")
    assert within([good], {"ttft": 0.1, "itl": 0.021, "e2e": 0.14}, 1)
    assert not within([good], {"itl": 0.019}, 1)
    for bad in (late, halting, failed):
        assert not within([good, bad], {"ttft": 0.2, "itl": 0.05}, 0.9)
        assert within([good, bad], {"ttft": 0.2, "itl": 0.05}, 0.5)


@pytest.mark.parametrize("start", [0.1, 1.0, 7.3, 60.0])
def test_the_search_finds_the_rate(start: float) -> None:
    capacity = 7.3
    search = RateSearch(start)
    while (rate := search.next()) is not None:
        search.learn(rate, rate <= capacity)
    assert search.low <= capacity < search.high
    assert search.high / search.low <= 1.1
    assert search.steps <= 12


def test_the_search_ends_where_nothing_holds_or_everything() -> None:
    for held in (False, True):
        search = RateSearch(1.0)
        while (rate := search.next()) is not None:
            search.learn(rate, held)
        assert (search.low == 0) is not held
        assert (search.high == float("inf")) is held


POSITIVE = st.floats(1e-3, 1e3)


@given(st.lists(POSITIVE, min_size=1, max_size=30), st.floats(0.01, 100))
def test_a_spread_is_of_its_values_whatever_their_order_and_unit(
    values: list[float], unit: float
) -> None:
    found = spread(values)
    assert min(values) <= found.low <= found.median <= found.high <= max(values)
    assert spread(values[::-1]) == found
    scaled = spread([value * unit for value in values])
    assert scaled.median == pytest.approx(found.median * unit)
    assert scaled.low == pytest.approx(found.low * unit)
    assert scaled.confidence == found.confidence <= 1


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=12))
def test_a_gain_and_its_inverse_never_both_win(pairs: list[tuple[float, float]]) -> None:
    """Swapped contenders have the opposite verdict, or the same lack of one."""
    own, other = [a for a, _ in pairs], [b for _, b in pairs]
    there = compare(own, other).verdict(higher_is_better=True)
    back = compare(other, own).verdict(higher_is_better=True)
    opposite = {"better": "worse", "worse": "better"}
    assert back == opposite.get(there or "", there)


@given(st.lists(POSITIVE, min_size=1, max_size=50), st.floats(0, 1), st.floats(0, 1))
def test_percentiles_grow_with_their_share(values: list[float], a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert percentile(values, low) <= percentile(values, high) * (1 + 1e-12)
    assert min(values) <= percentile(values, a) <= max(values) * (1 + 1e-12)


@given(st.floats(0.05, 50), st.floats(0.05, 50))
def test_the_search_never_leaves_its_bracket(capacity: float, start: float) -> None:
    search = RateSearch(start)
    while (rate := search.next()) is not None:
        assert search.low < rate < search.high
        search.learn(rate, rate <= capacity)
    assert search.low <= capacity < search.high
