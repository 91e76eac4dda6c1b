"""The products' kernels compile for every generation of GPUs, and keep to their registers.

Those that a product takes before anything is timed stand for all of them: a kernel for few tokens
of each kind of weight, and the expansion.
"""

from __future__ import annotations

import pytest
import torch

from besa.kernels.cuda import compiler, tuning
from besa.kernels.cuda.call import Needed, Shape
from besa.kernels.cuda.candidates import Gpu
from tests.kernels.cuda.gpus import TARGETS, compiled

BF16, FP16, INT8 = torch.bfloat16, torch.float16, torch.int8

# Bytes in the code that move registers to memory and back. Which of the large blocks for 64 tokens
# is the fastest is timed, so that one that spills a little does no harm.
MOST_SPILLED = 256

SHAPES = {
    "bf16": Shape(4096, 4096, BF16, BF16, False, 1280, 0, False),
    "fp16": Shape(4096, 4096, FP16, FP16, False, 1280, 0, False),
    "2:4": Shape(4096, 4096, BF16, BF16, True, 1152, 0, False),
    "int8": Shape(4096, 4096, INT8, BF16, False, 768, 0, True),
    "int8, groups of 128": Shape(4096, 4096, INT8, BF16, False, 768, 128, True),
}


def needed_for(shape: Shape, gpu: Gpu) -> set[Needed]:
    table = tuning.untimed(shape, gpu)
    return {one for n in (1, 64, 2048) for one in table.way(n).kernels(shape, min(n, 1024)) or []}


@pytest.mark.slow
@pytest.mark.skipif(compiler.nvrtc() is None, reason="needs NVRTC")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", SHAPES)
def test_compiles(kind: str, target: str) -> None:
    needed = needed_for(SHAPES[kind], TARGETS[target])
    assert len(needed) >= 3
    for one in needed:
        assert compiled(one, target).spilled <= MOST_SPILLED, one
