"""The allocation benchmark runs, and its contenders do the same thing."""

from __future__ import annotations

import pytest

from tests.benchmarks.conftest import ROOT

pytestmark = pytest.mark.slow


def test_tiny(benchmark):
    result = benchmark("allocation", "--dtypes", "bfloat16")
    assert result["conditions"]["torch"]
    (case,) = result["results"]
    assert case["alike"]["equal_mask_entries"] == 1
    assert case["alike"]["least_gradient_cosine"] > 0.999
    for part in ("mask", "step"):
        assert case[part]["seconds"]["besa"]["median"] > 0
        size = case[part]["bytes"]
        assert size["dense"]["of_representation"] == 8 * size["besa"]["of_representation"]


def test_contenders_that_differ_are_not_timed(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import allocation

    block = allocation.Block(allocation.Case("tiny", "float32", "cpu", 4, 1))
    scores = list(block.scores())
    ways = {c: [allocation.REPRESENTATION[c](s) for s in scores] for c in allocation.CONTENDERS}
    assert allocation.check_alike(block, ways)["equal_mask_entries"] == 1
    ways["dense"][3] = ways["dense"][3].flip(1)
    with pytest.raises(SystemExit, match="not alike"):
        allocation.check_alike(block, ways)
