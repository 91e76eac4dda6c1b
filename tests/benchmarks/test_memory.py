"""The memory benchmark runs, and what it reads of a child process is that child's."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.benchmarks.conftest import ROOT

pytestmark = pytest.mark.slow


def test_tiny(benchmark):
    result = benchmark("memory", "--methods", "wanda")
    peaks = result["methods"]["wanda"]["peak_rss"]
    assert set(peaks) == {"1 layers", "2 layers"}
    assert min(peak["min"] for peak in peaks.values()) > 0.8 * result["imports_rss"]


def test_a_childs_peak_is_its_own(environment):
    code = (
        "import sys; from common import run_measured\n"
        "run = lambda mib: run_measured([sys.executable, '-c', f'b\"x\" * ({mib} << 20)'])\n"
        "print((run(300).peak_rss - run(100).peak_rss) >> 20)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "benchmarks",
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert 190 <= int(done.stdout) <= 210
