"""The allocation benchmark runs, and its contenders do the same thing."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow


def test_tiny(benchmark):
    result = benchmark("allocation", "--dtypes", "float32")
    assert result["conditions"]["torch"]
    (case,) = result["results"]
    assert case["alike"]["equal_mask_entries"] == 1
    assert case["alike"]["least_gradient_cosine"] > 0.9999
    for part in ("mask", "step"):
        assert case[part]["seconds"]["besa"]["median"] > 0
        size = case[part]["bytes"]
        assert size["dense"]["of_representation"] == 8 * size["besa"]["of_representation"]
