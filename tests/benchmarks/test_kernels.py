"""The kernels' benchmarks run, and tables and a picture come from what they write."""

from __future__ import annotations

import copy
import xml.etree.ElementTree as ET

import pytest

from tests.benchmarks.conftest import ROOT

pytestmark = pytest.mark.slow


def test_tiny(benchmark, monkeypatch):
    record = benchmark("kernels")
    assert record["conditions"]["isa"]
    assert len(record["results"]) == 4 * 2 * 2  # types, threads, tokens
    for row in record["results"]:
        more = {"int8 50%"} if row["dtype"] == "int4" else set()
        expected = {"torch", "dense", "50%", "60%", "70%", "80%", "2:4"}
        assert set(row["contenders"]) == expected | more
        assert row["read_bandwidth"]["best"] > 1e8
        fifty, dense = (row["contenders"][name] for name in ("50%", "dense"))
        assert fifty["seconds"]["median"] > 0
        if row["dtype"] == "bfloat16":
            assert fifty["bytes"] / dense["bytes"] == pytest.approx(9 / 16, abs=0.02)

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import kernel_report

    as_real = copy.deepcopy(record)
    for row in as_real["results"]:
        row["shape"] = kernel_report.SHAPE
    picture = ET.fromstring(kernel_report.plot(as_real))
    circles = [one for one in picture.iter() if one.tag.endswith("circle")]
    assert len(circles) == 3 * 4 * 2  # types, lines, tokens
    table = kernel_report.readme_table(as_real)
    assert table.count("| bfloat16, 1 token |") == 1
    by_isa = kernel_report.isa_table(as_real, as_real)
    assert by_isa.count("| int4, 1 token |") == 1
    assert by_isa.count(f"`{record['conditions']['isa']}`") == 2


def test_experts(benchmark, monkeypatch):
    record = benchmark("experts")
    assert [row["tokens"] for row in record["results"]] == [1, 20]
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import experts

    table = experts.experts_table(record)
    assert table.count("| 1 token |") == 1
    assert table.count(" | eager | grouped_mm | ") == 1
