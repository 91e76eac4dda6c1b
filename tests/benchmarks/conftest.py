"""Runs the benchmarks as their readers do: as scripts, from a checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

Benchmark = Callable[..., dict[str, Any]]


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable}


@pytest.fixture
def benchmark(tmp_path: Path, environment: dict[str, str]) -> Benchmark:
    """Runs `benchmarks/NAME.py --tiny ARGUMENTS`; gives the JSON that it writes."""

    def run(name: str, *arguments: str) -> dict[str, Any]:
        result = tmp_path / f"{name}.json"
        script = ROOT / "benchmarks" / f"{name}.py"
        done = subprocess.run(
            [sys.executable, script, "--tiny", "--json", result, *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        read: dict[str, Any] = json.loads(result.read_text())
        return read

    return run
