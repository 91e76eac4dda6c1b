"""How many instructions a packed product takes: a count that no busy machine can blur.

callgrind knows no AVX-512, so the AVX2 kernels stand for all: the loops are the same templates. The
counts are for a weight whose half is zero, in instructions a weight for all tokens together;
they were taken with GCC 12 and may grow by a tenth before this fails. test_arm.py
counts those for Arm.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from besa.kernels import native
from besa.kernels.abi import DTYPES, ISAS
from besa.kernels.isa import best_isa
from tests.helpers import REPOSITORY

BFLOAT16, INT8 = DTYPES["bfloat16"], DTYPES["int8"]
HEADERS = REPOSITORY / "besa" / "kernels"
WEIGHTS = 64 * 2048

# (type, tokens): instructions a weight.
COUNTS = {
    (BFLOAT16, 1): 1.20,
    (BFLOAT16, 4): 1.77,
    (BFLOAT16, 64): 16.7,
    (INT8, 1): 1.06,
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("valgrind"), reason="no valgrind"),
    pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler"),
    pytest.mark.skipif(best_isa() in (None, "portable"), reason="no AVX2 kernels here"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("count") / "count"
    source = Path(__file__).with_name("count.cpp")
    options = ["-O1", "-std=c++17", f"-I{HEADERS}"]
    subprocess.run(["g++", *options, str(source), "-o", str(out), "-ldl"], check=True)
    return out


@pytest.mark.parametrize(("dtype", "tokens"), COUNTS)
def test_no_more_instructions_than_it_took(program: Path, dtype: int, tokens: int, tmp_path: Path):
    out = tmp_path / "callgrind"
    library, isa = native.path(), ISAS.index("avx2")
    subprocess.run(
        [
            "valgrind",
            "--tool=callgrind",
            "--toggle-collect=besa_sparse_linear",
            f"--callgrind-out-file={out}",
            *(str(word) for word in (program, library, dtype, tokens, isa, 1)),
        ],
        check=True,
        capture_output=True,
    )
    found = re.search(r"^(?:summary|totals): (\d+)", out.read_text(), re.MULTILINE)
    assert found
    count = int(found[1]) / WEIGHTS
    expected = COUNTS[dtype, tokens]
    assert 0.7 * expected < count < 1.1 * expected, f"{count:.3f} instructions a weight"
