"""Stub servers as processes, and `besa bench` with them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.helpers import PATIENCE, REPOSITORY


@contextmanager
def stub(*arguments: object) -> Iterator[str]:
    """A stub server; gives its URL."""
    command = [sys.executable, str(Path(__file__).with_name("stub.py")), *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


def entries(journal: Path) -> list[dict[str, Any]]:
    """What a stub server did, a request each."""
    return [json.loads(line) for line in journal.read_text().splitlines()]


def lateness(journal: Path) -> float:
    """How many seconds late the machine wakes who sleeps, nine times in ten at most.

    A client is late as its server is. So this much a figure may be off on a busy machine.
    """
    late = sorted(seconds for entry in entries(journal) for seconds in entry["late"])
    return float(late[len(late) * 9 // 10])


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}


def start_bench(out: Path, *arguments: object) -> subprocess.Popen[str]:
    """A `besa bench` that runs."""
    command = [sys.executable, "-m", "besa", "bench", *map(str, arguments), "--out", str(out)]
    return subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )


def bench(out: Path, *arguments: object) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """`besa bench` to its end, and its results.json; empty if it wrote none."""
    process = start_bench(out, *arguments)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    done = subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
    results = out / "results.json"
    return done, json.loads(results.read_text()) if results.exists() else {}
