"""What the GPU's benchmarks record, continue and report, without a GPU."""

from __future__ import annotations

import json

import pytest

from tests.benchmarks.conftest import ROOT


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def row(kind, shape, tokens, ratio, **more):
    spread = {"median": ratio, "min": ratio - 0.01, "max": ratio + 0.01, "runs": 3}
    us = {**spread, "median": 10.0}
    return {"kind": kind, "shape": shape, "tokens": tokens, "times_dense": spread, "us": us, **more}


def verdicts(rows):
    import gpu_report

    return {bar.what: bar.cells() for bar in gpu_report.kernel_bars(rows)}


def test_a_bar_is_held_against_the_worst_of_all_shapes():
    rows = [row("50%", f"shape {i}", 1, 1.5 + i / 10, right=True) for i in range(5)]
    what = "50%, 1 token, times F.linear"
    cells = verdicts(rows)[what]
    assert cells[1:4] == ["≥ 1.50", "1.500", "ok"]
    assert cells[4].startswith("shape 0")
    assert verdicts(rows[:4])[what][3] == "open"
    assert verdicts([*rows[1:], row("50%", "narrow", 1, 1.49, right=True)])[what][3] == "short"
    assert verdicts([*rows[1:], row("50%", "narrow", 1, 1.9, right=False)])[what][2:] == [
        "-",
        "wrong",
        "narrow, tokens 1",
    ]
    failed = {"kind": "50%", "shape": "narrow", "tokens": 1, "failed": "OutOfMemoryError"}
    assert verdicts([*rows[1:], failed])[what][3] == "wrong"


def test_memory_has_to_be_below_its_bar():
    import gpu_report

    def verdict(share):
        return gpu_report.Bar("", 0.6, [gpu_report.Figure(share)], at_least=False).cells()[3]

    assert (verdict(0.6), verdict(0.61)) == ("ok", "short")


def test_checks_name_what_is_wrong():
    import gpu_report

    record = {"rows": [row("50%", "64x64", 4, 1.0, right=True), row("2:4", "8x8", 1, 1, right=0)]}
    assert gpu_report.checks_row({"kernels": record}) == [
        "checks",
        "all 2",
        "1",
        "wrong",
        "kernels 2:4 8x8 1",
    ]


def test_a_record_goes_on_where_it_was_cut_off(tmp_path):
    from gpu_timing import Record

    def record(seconds=1e6, **settings):
        return Record(tmp_path / "x.json", "cpu", seconds, {"rounds": 3, **settings})

    def fails():
        raise RuntimeError("out of memory")

    first = record()
    first.attempt({"tokens": 1}, lambda: {"us": 5.0})
    first.attempt({"tokens": 2}, fails)
    stored = json.loads((tmp_path / "x.json").read_text())
    assert [row.get("failed") for row in stored["rows"]] == [None, "RuntimeError: out of memory"]
    assert not stored["finished"]
    with pytest.raises(SystemExit, match="1 of 2 cases failed"):
        first.finish()

    second = record()
    second.attempt({"tokens": 1}, fails)  # it is there, so this is not called
    second.attempt({"tokens": 2}, lambda: {"us": 7.0})
    second.finish()
    stored = json.loads((tmp_path / "x.json").read_text())
    assert stored["finished"]
    assert stored["rows"] == [{"tokens": 1, "us": 5.0}, {"tokens": 2, "us": 7.0}]

    assert record(tiny=True).rows == []  # other settings: nothing to go on with
    late = record(seconds=-1e6)
    late.attempt({"tokens": 4}, fails)
    late.finish()
    assert json.loads((tmp_path / "x.json").read_text())["left_out"] == 1


def test_turns_are_paired():
    import torch
    from gpu_timing import Captured, compared, taking_turns

    figures = compared(torch.tensor([[4e-6, 2e-6], [9e-6, 3e-6], [8e-6, 2e-6]]).double(), calls=2)
    ratios = {"median": 3.0, "low": 2.0, "high": 4.0, "min": 2.0, "max": 4.0, "runs": 3}
    assert figures["times_dense"] == ratios
    assert figures["us"]["median"] == pytest.approx(1.0)

    calls = []
    works = [lambda i=i: calls.append(i) or torch.tensor(float(i)) for i in range(3)]
    captured = Captured(works, 4, "cpu")
    assert calls == [0, 1, 2, 0]
    assert captured.output == 0
    assert taking_turns(captured, captured, 2, "cpu")["times_dense"]["runs"] == 2


def test_masks_are_uneven_and_exact():
    from gpu_kernels import random_mask

    mask = random_mask(256, 64, None, 0, "cpu")
    assert (mask.view(256, 16, 4).sum(2) == 2).all()
    assert len(mask.view(-1, 4).unique(dim=0)) == 6
    rates = 1 - random_mask(256, 4096, 0.7, 0, "cpu").double().mean(1)
    assert rates.mean() == pytest.approx(0.7, abs=1e-3)
    assert rates.std() == pytest.approx(0.05, abs=0.01)
