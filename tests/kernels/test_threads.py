"""The threads of a library that was compiled without OpenMP."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers import PATIENCE, REPOSITORY

KERNELS = REPOSITORY / "besa" / "kernels"

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")


def _run(program: Path, source: str, *options: str) -> None:
    """Compiles a program with the pool; it is to end with 0."""
    sources = [str(Path(__file__).with_name(source)), str(KERNELS / "threads.cpp")]
    options = ("-std=c++17", "-g", "-O1", "-pthread", f"-I{KERNELS}", *options)
    subprocess.run(["g++", *options, *sources, "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr


def test_a_pool_does_all_of_the_work_once_and_at_once(tmp_path: Path):
    """Watched by ThreadSanitizer."""
    _run(tmp_path / "threads", "threads.cpp", "-fsanitize=thread")


def test_a_child_of_a_fork_has_a_pool_of_its_own(tmp_path: Path):
    _run(tmp_path / "forked", "threads_forked.cpp")
