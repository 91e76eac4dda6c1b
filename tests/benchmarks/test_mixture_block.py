"""The benchmark of a large mixture's block runs, on a small one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from besa.bench.random_models import shape_config
from tests.benchmarks.conftest import ROOT, Script

pytestmark = pytest.mark.slow

SMALL = {
    "hidden_size": 32,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 300,
}


def test_a_small_one(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shape, result = tmp_path / "small.json", tmp_path / "result.json"
    shape.write_text(json.dumps({**shape_config("qwen3-30b-a3b"), **SMALL}))
    script("mixture_block", "--shape", shape, "--samples", 2, "--seqlen", 16, "--json", result)
    record = json.loads(result.read_text())
    assert record["layers"] == 48
    assert all(one["block_seconds"] > 0 for one in record["methods"].values())
    assert all(one["peak_rss"] > 1 << 28 for one in record["methods"].values())  # Python and torch
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import readme

    table = readme.mixture_cost(record)
    assert table.count("masks alone") == len(record["methods"]) == 2
