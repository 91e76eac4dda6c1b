"""The threads of a library that was compiled without OpenMP, watched by ThreadSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers import PATIENCE, REPOSITORY

KERNELS = REPOSITORY / "besa" / "kernels"


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_a_pool_does_all_of_the_work_once_and_at_once(tmp_path: Path):
    program, source = tmp_path / "threads", Path(__file__).with_name("threads.cpp")
    options = ["-std=c++17", "-g", "-O1", "-fsanitize=thread", "-pthread", f"-I{KERNELS}"]
    sources = [str(source), str(KERNELS / "threads.cpp")]
    subprocess.run(["g++", *options, *sources, "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
