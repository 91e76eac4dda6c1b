"""The bits of every format are counted, and a table comes from them."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.conftest import ROOT

pytestmark = pytest.mark.slow


def test_every_format_at_every_sparsity(benchmark, monkeypatch):
    record = benchmark("bits")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import bits

    formats = [(kind, group) for kind, groups in bits.GROUPS.items() for group in groups]
    found = {(row["values"], row["group_size"], row["setting"]): row for row in record["rows"]}
    assert set(found) == {(*one, setting) for one in formats for setting in bits.SETTINGS}
    for (kind, group, setting), row in found.items():
        kept = 0.5 if setting == "2:4" else 1 - int(setting.rstrip("%")) / 100
        assert row["nonzeros"] / row["weights"] == pytest.approx(kept, abs=0.01)
        rows = row["row_numbers_bytes"] // 4
        # Seven linears, of which the last has 64 rows of 176 columns and the others 64 columns.
        groups = rows if group is None else (rows - 64) * -(-64 // group) + 64 * -(-176 // group)
        more = {"int8": 4 * groups, "int4": 4 * rows + groups}.get(kind, 0)
        size = row["nonzeros"] * bits.BITS[kind] // 8 + row["weights"] // 8 + 4 * rows + more
        # A row of int4 values has nibbles that nothing is in: half of them, with 64 columns.
        most = size + row["nonzeros"] // 2 if kind == "int4" else size
        assert size <= row["disk_bytes"] <= most, (kind, group, setting)
        # Where each row begins, int64, is what memory has more.
        assert row["memory_bytes"] == row["disk_bytes"] + 8 * (rows + 7)
        assert (row["gpu_bytes"] is None) == (kind == "float32")
    table = bits.bits_tables(record)
    assert table.count("\n| int4, groups of 64 | ") == 2
    assert table.count("\n| float32 | ") == 1


def test_what_is_kept(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import bits

    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0], [0.5, 0.25, -9.0, 8.0]])
    assert bits.kept(weight, "2:4").int().tolist() == [[0, 1, 0, 1], [0, 0, 1, 1]]
    assert bits.kept(weight, "50%").int().tolist() == [[0, 1, 0, 1], [0, 0, 1, 1]]
    assert bits.kept(weight, "75%").sum() == 2
