"""A short soak of a real server: every request is answered, and it drains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from besa.demo import MODEL
from tests.benchmarks.conftest import ROOT

pytestmark = pytest.mark.slow


def test_short(tmp_path: Path, environment: dict[str, str]) -> None:
    result = tmp_path / "soak.json"
    arguments = ["--minutes", "0.3", "--clients", "16", "--no-chat", "--json", result]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "soak.py", MODEL, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    record = json.loads(result.read_text())
    assert record["wrong"] == []
    assert record["requests"] == sum(record["done"].values()) > 0
    assert record["memory"]["bytes"]
    assert record["drain"] == {"streams": 8, "whole": 8, "exit_code": 0, "left": []}
