"""What is compiled for one instruction set stays in its own object.

The linker keeps one copy of a function that several objects have by the same name, from whichever
comes first. If that was compiled with AVX-512, the library ends with an illegal instruction on a
CPU that has none.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Where `make` leaves what it compiles.
OBJECTS = sorted((Path(sys.prefix) / "kernels").rglob("sparse_linear_*.o"))

pytestmark = [
    pytest.mark.skipif(not OBJECTS, reason="the kernels were not compiled by `make`"),
    pytest.mark.skipif(not shutil.which("nm"), reason="no nm"),
]


@pytest.mark.parametrize("compiled", OBJECTS, ids=lambda path: path.name)
def test_no_function_is_shared_with_another_instruction_set(compiled: Path):
    listed = subprocess.run(
        ["nm", "--demangle", compiled], capture_output=True, text=True, check=True
    )
    defined = [line.split(maxsplit=2) for line in listed.stdout.splitlines() if line[:1] != " "]
    shared = [name for _, kind, name in defined if kind in "WV" and "DW.ref" not in name]
    assert shared == []
    own = [name for _, kind, name in defined if kind == "T"]
    assert [name for name in own if not name.startswith("besa::sparse_linear_")] == []
