"""Masks against numpy: which weights go, and exactly how many."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import Tensor

from besa.pruning import patterns
from besa.pruning.patterns import (
    counts_for,
    kth_lowest,
    lowest_pruned,
    lowest_pruned_overall,
    n_of_m,
)

rates_lists = st.lists(st.floats(0, 1), min_size=1, max_size=40)
# Few different values, so that ties are the rule.
scores_arrays = npst.arrays(
    np.float32,
    npst.array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.sampled_from([0.0, 0.5, 1.0, 2.0, 1e-30, 3e38]),
)


def numpy_lowest_pruned(scores: np.ndarray, counts: list[int]) -> np.ndarray:
    mask = np.ones(scores.shape, dtype=bool)
    for row, count in enumerate(counts):
        by_score_then_place = sorted(range(scores.shape[1]), key=lambda j: (scores[row, j], j))
        mask[row, by_score_then_place[:count]] = False
    return mask


@st.composite
def budgets(draw: st.DrawFn) -> tuple[list[float], list[int], int]:
    rates = draw(rates_lists)
    cols = draw(st.lists(st.integers(1, 500), min_size=len(rates), max_size=len(rates)))
    return rates, cols, draw(st.integers(0, sum(cols)))


@settings(max_examples=300, deadline=None)
@given(budgets())
def test_counts_sum_to_the_total_and_fit_the_rows(budget: tuple[list[float], list[int], int]):
    rates, cols, total = budget
    counts = counts_for(torch.tensor(rates), torch.tensor(cols), total)
    assert counts.dtype == torch.int64
    assert int(counts.sum()) == total
    assert (counts >= 0).all()
    assert (counts <= torch.tensor(cols)).all()


@settings(max_examples=200, deadline=None)
@given(rates_lists, st.integers(1, 300), st.data())
def test_a_higher_rate_never_gets_fewer(rates: list[float], cols: int, data: st.DataObject):
    total = data.draw(st.integers(0, cols * len(rates)))
    given_rates = torch.tensor(rates)
    counts = counts_for(given_rates, cols, total).tolist()
    for rate, count in zip(given_rates.tolist(), counts, strict=True):
        for other_rate, other_count in zip(given_rates.tolist(), counts, strict=True):
            if rate > other_rate + 1e-7:
                assert count >= other_count


@settings(max_examples=200, deadline=None)
@given(rates_lists, st.integers(1, 300), st.data())
def test_raising_a_rate_never_lowers_its_own_count(
    rates: list[float], cols: int, data: st.DataObject
):
    total = data.draw(st.integers(0, cols * len(rates)))
    row = data.draw(st.integers(0, len(rates) - 1))
    before = counts_for(torch.tensor(rates), cols, total)[row]
    rates[row] = min(1.0, rates[row] + data.draw(st.floats(0.01, 1)))
    assert counts_for(torch.tensor(rates), cols, total)[row] >= before


@settings(max_examples=200, deadline=None)
@given(rates_lists, st.integers(1, 300))
def test_counts_that_already_fit_are_the_rates(rates: list[float], cols: int):
    wished = [round(rate * cols) for rate in rates]
    exact = torch.tensor([count / cols for count in wished], dtype=torch.float64)
    assert counts_for(exact, cols, sum(wished)).tolist() == wished


@pytest.mark.parametrize("rate", [0.1, 0.5, 1 / 3, 0.7, 0.95])
@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("cols", [1, 8, 100, 4096])
def test_uniform_rates_give_uniform_counts(rate: float, rows: int, cols: int):
    total = round(rate * rows * cols)
    counts = counts_for(torch.full((rows,), rate), cols, total)
    assert set(counts.tolist()) <= {total // rows, -(-total // rows)}
    assert int(counts.sum()) == total


def test_rows_of_different_length_share_by_their_length():
    cols = torch.tensor([10, 1000, 100_000, 7])
    counts = counts_for(torch.full((4,), 0.5), cols, int(cols.sum()) // 2)
    assert ((counts - cols * 0.5).abs() <= 1).all()


def test_extreme_rates_are_lifted_and_lowered_together():
    # Rates that ask for far less, and far more, than the total.
    assert counts_for(torch.zeros(4), 8, 16).tolist() == [4, 4, 4, 4]
    assert counts_for(torch.ones(4), 8, 16).tolist() == [4, 4, 4, 4]
    # A row at its end stays there; the others make up for it.
    assert counts_for(torch.tensor([1.0, 0.0]), 8, 12).tolist() == [8, 4]
    assert counts_for(torch.tensor([1.0, 0.0, 0.0]), 8, 0).tolist() == [0, 0, 0]
    assert counts_for(torch.tensor([1.0, 0.0, 0.0]), 8, 24).tolist() == [8, 8, 8]


@settings(max_examples=200, deadline=None)
@given(scores_arrays, st.data())
def test_lowest_pruned_is_brute_force(scores: np.ndarray, data: st.DataObject):
    rows, cols = scores.shape
    counts = data.draw(st.lists(st.integers(0, cols), min_size=rows, max_size=rows))
    mask = lowest_pruned(torch.from_numpy(scores), torch.tensor(counts))
    assert mask.dtype == torch.bool
    assert np.array_equal(mask.numpy(), numpy_lowest_pruned(scores, counts))


@settings(max_examples=200, deadline=None)
@given(scores_arrays, st.data())
def test_lowest_pruned_overall_is_brute_force(scores: np.ndarray, data: st.DataObject):
    count = data.draw(st.integers(0, scores.size))
    mask = lowest_pruned_overall(torch.from_numpy(scores), count)
    expected = numpy_lowest_pruned(scores.reshape(1, -1), [count]).reshape(scores.shape)
    assert np.array_equal(mask.numpy(), expected)


@settings(max_examples=300, deadline=None)
@given(npst.arrays(np.float32, st.integers(1, 40), elements=st.floats(width=32)), st.data())
def test_kth_lowest_is_kthvalue(values: np.ndarray, data: st.DataObject):
    """Of all numbers there are: denormal and infinite ones, zeros of both signs, NaN."""
    k = data.draw(st.integers(1, len(values)))
    found = kth_lowest(torch.from_numpy(values), k)
    expected = torch.from_numpy(values).kthvalue(k).values
    assert torch.equal(found, expected) or (found.isnan() and expected.isnan())


def test_kth_lowest_where_numbers_share_their_upper_bits():
    values = torch.arange(1 << 12).add(0x3F800000).int().view(torch.float32)  # from 1 upwards
    shuffled = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]
    for k in (1, 2, 2000, len(values)):
        assert kth_lowest(shuffled, k) == values[k - 1]


@pytest.mark.parametrize("count", [0, 1, 35, 36])
def test_lowest_pruned_overall_where_all_are_equal(count: int):
    mask = lowest_pruned_overall(torch.ones(6, 6), count)
    assert mask.flatten().tolist() == [False] * count + [True] * (36 - count)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (3, 4), (1, 2)])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_n_of_m_is_brute_force(n: int, m: int, data: st.DataObject):
    rows, groups = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 4)))
    elements = st.sampled_from([0.0, 1.0, 2.0, 3.0])
    scores = data.draw(npst.arrays(np.float32, (rows, groups * m), elements=elements))
    mask = n_of_m(torch.from_numpy(scores), n, m).numpy()
    expected = numpy_lowest_pruned(scores.reshape(-1, m), [m - n] * (rows * groups))
    assert np.array_equal(mask, expected.reshape(scores.shape))
    assert (mask.reshape(-1, m).sum(1) == n).all()


@pytest.mark.parametrize("m", [256, 257])
@pytest.mark.parametrize("n", [1, 255])
def test_large_groups(n: int, m: int):
    scores = torch.randint(0, 50, (3, 2 * m), generator=torch.Generator().manual_seed(0)).float()
    expected = numpy_lowest_pruned(scores.reshape(-1, m).numpy(), [m - n] * 6)
    assert np.array_equal(n_of_m(scores, n, m), expected.reshape(3, 2 * m))


def test_chunks_of_rows_give_the_whole(monkeypatch: pytest.MonkeyPatch):
    def all_masks() -> list[Tensor]:
        return [lowest_pruned(scores, counts), n_of_m(scores, 2, 4)]

    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(37, 16, generator=generator)
    counts = torch.randint(0, 17, (37,), generator=generator)
    whole = all_masks()
    monkeypatch.setattr(patterns, "_CHUNK", 50)  # three rows at a time
    assert all(torch.equal(a, b) for a, b in zip(whole, all_masks(), strict=True))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 100), st.integers(1, 10**8))
def test_chunks_cover_all_rows_once(rows: int, cols: int):
    covered = [row for chunk in patterns.row_chunks(rows, cols) for row in range(rows)[chunk]]
    assert covered == list(range(rows))
