"""The cores and the cache that vLLM gets on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import besa.serve.cpu
import besa.serve.vllm.cpu
from besa.machine import Memory
from besa.serve.vllm.cpu import binding, cache_gib, cache_space, thread_binding


@pytest.mark.parametrize(
    ("nodes", "ranks", "most", "expected"),
    [
        ([[0, 1]], 1, None, "0-1"),
        ([[0, 1]], 2, None, "0|1"),
        ([[0, 1, 2]], 2, None, "0|1"),
        ([[0, 2, 4, 5, 6]], 1, None, "0,2,4-6"),
        ([[0, 1, 2, 3], [4, 5, 6, 7]], 1, None, "0-3"),
        ([[0, 1, 2, 3], [4, 5, 6, 7]], 2, None, "0-3|4-7"),
        ([[0, 1, 2, 3], [4, 5, 6, 7]], 4, None, "0-1|2-3|4-5|6-7"),
        ([[0, 1, 2, 3]], 2, 1, "0|2"),
        ([[0]], 2, None, None),
    ],
)
def test_binding(nodes: list[list[int]], ranks: int, most: int | None, expected: str | None):
    assert binding(nodes, ranks, most) == expected


@pytest.mark.parametrize(
    ("threads", "share", "ranks", "expected"),
    [
        (None, None, 1, "0-3"),
        ("2", None, 1, "0-1"),
        ("2,1", None, 1, "0-1"),
        ("", None, 1, "0-3"),
        (None, 1.5, 1, "0-1"),
        (None, 2.0, 2, "0|2"),
        ("1", 3.0, 1, "0"),
        (None, 0.5, 2, "0|2"),
    ],
)
def test_fewer_threads(
    monkeypatch: pytest.MonkeyPatch,
    threads: str | None,
    share: float | None,
    ranks: int,
    expected: str,
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(besa.serve.vllm.cpu, "physical_cores", lambda: [[0, 1, 2, 3]])
    monkeypatch.setattr(besa.serve.cpu, "core_share", lambda: share)
    assert thread_binding(ranks) == expected


@pytest.mark.parametrize(
    ("available", "weights", "sequence", "ranks", "expected"),
    [
        (64, 0, None, 1, 30),
        (64, 20, None, 1, 18),
        (64, 0, 0.125, 1, 8),  # 64 sequences
        (64, 0, None, 2, 15),
        (4, 20, 1, 1, 1),  # at least one, whatever is free
    ],
)
def test_the_cache(available: int, weights: int, sequence: float | None, ranks: int, expected: int):
    gib = 1 << 30
    found = cache_space(
        available * gib,
        weights * gib,
        None if sequence is None else int(sequence * gib),
        ranks,
    )
    assert found == expected


def test_the_cache_beside_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(besa.serve.vllm.cpu, "memory", lambda: Memory(64 << 30, 64 << 30, None, 0))
    (tmp_path / "config.json").write_text(json.dumps({}))
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(20 << 30)  # takes no room
    assert cache_gib(tmp_path, 1) == 18
