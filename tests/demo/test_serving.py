"""What `besa demo` ends with: the model that besa carries, packed, served and measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from besa import PruneConfig, prune
from besa.bench.events import Event
from besa.demo import MODEL, SEQLEN
from besa.demo.serving import serve_and_measure


@pytest.mark.slow
def test_the_demo_serves_what_it_pruned(tmp_path: Path) -> None:
    pruned = tmp_path / "pruned"
    prune(MODEL, PruneConfig(out=pruned, method="magnitude", samples=4, seqlen=SEQLEN))
    told: list[Event] = []
    results = serve_and_measure(pruned, tmp_path, told.append)
    assert [contender.name for contender in results.sound] == ["dense", "packed 50%"]
    dense, packed = results.contenders
    assert packed.packing is not None
    assert packed.packing.pattern == "unstructured"
    assert dense.disk_bytes is not None
    assert packed.disk_bytes is not None
    assert packed.disk_bytes < 0.75 * dense.disk_bytes
    assert {m.contender for m in results.measurements} == {"dense", "packed 50%"}
    assert (tmp_path / "bench" / "report.html").exists()
    assert any("round 5 of 5" in str(event) for event in told)
