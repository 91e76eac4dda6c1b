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
Script = Callable[..., None]


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable}


@pytest.fixture
def script(tmp_path: Path, environment: dict[str, str]) -> Script:
    """Runs `benchmarks/NAME.py ARGUMENTS` to its end."""

    def run(name: str, *arguments: object) -> None:
        done = subprocess.run(
            [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout

    return run


@pytest.fixture
def benchmark(tmp_path: Path, script: Script) -> Benchmark:
    """Runs `benchmarks/NAME.py --tiny ARGUMENTS`; gives the JSON that it writes."""

    def run(name: str, *arguments: str) -> dict[str, Any]:
        result = tmp_path / f"{name}.json"
        script(name, "--tiny", "--json", result, *arguments)
        read: dict[str, Any] = json.loads(result.read_text())
        return read

    return run
