"""The wall-clock benchmark runs."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slow


def test_tiny(benchmark):
    (result,) = benchmark("wallclock")["models"].values()
    assert result["ratio"]["median"] > 0
    assert result["settings"]["samples"] == 2
    assert result["reported_seconds"]["besa"]["max"] < result["wall_clock_seconds"]["besa"]["max"]
