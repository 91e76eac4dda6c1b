"""Comparisons: every contender at every setting, and models that are left are used again."""

from __future__ import annotations

from pathlib import Path

import pytest

from besa.demo import compare as module
from besa.demo.compare import Contender, compare

SETTINGS = {"50%": {"sparsity": 0.5, "samples": 8}, "2:4": {"pattern": "2:4", "samples": 8}}
CONTENDERS = [Contender("wanda"), Contender("besa", "none", "layer"), Contender("besa")]


def test_each_contender_is_itself_and_is_pruned_once(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = []
    prune = module.prune
    monkeypatch.setattr(
        module, "prune", lambda model, config: pruned.append(config) or prune(model, config)
    )
    first = compare(tiny_model, tmp_path, SETTINGS, CONTENDERS, seqlen=32, limit=4)
    assert [(row.setting, row.method, row.update, row.granularity) for row in first.rows] == [
        (setting, *contender)
        for setting in SETTINGS
        for contender in (
            ("wanda", "none", None),
            ("besa", "none", "layer"),
            ("besa", "auto", None),
        )
    ]
    assert [row.recipe for row in first.rows[:3]] == [
        "Wanda",
        "BESA, rates by layer",
        "BESA + guarded updates",
    ]
    assert len(pruned) == 6
    assert len({Path(config.out).name for config in pruned}) == 6

    again = compare(tiny_model, tmp_path, SETTINGS, CONTENDERS, seqlen=32, limit=4, reuse=True)
    assert len(pruned) == 6
    assert again == first

    other = {"50%": {"sparsity": 0.5, "samples": 9}}
    compare(tiny_model, tmp_path, other, CONTENDERS[:1], seqlen=32, limit=4, reuse=True)
    assert len(pruned) == 7
