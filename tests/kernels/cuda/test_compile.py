"""What NVRTC makes of the kernels for each architecture: registers, and no spills."""

from __future__ import annotations

import pytest
import torch

from besa.kernels.cuda.call import Shape
from besa.kernels.cuda.candidates import candidates
from besa.kernels.cuda.expansion import Expand
from besa.kernels.cuda.multiply import Multiply
from tests.kernels.cuda.gpus import GPUS, TARGETS, compiled

BF16, FP16 = torch.bfloat16, torch.float16

# A weight of each kind, as large as a model's.
KINDS = {
    "50%": Shape(4096, 4096, BF16, BF16, False, 1280, 0, False),
    "70%": Shape(4096, 4096, FP16, FP16, False, 1024, 0, False),
    "2:4": Shape(4096, 4096, BF16, BF16, True, 1152, 0, False),
    "int8": Shape(4096, 4096, torch.int8, BF16, False, 768, 0, True),
    "int8 in groups of 32": Shape(4096, 4096, torch.int8, FP16, False, 768, 32, True),
    "int8 by floats": Shape(4096, 4096, torch.int8, BF16, False, 768, 128, False),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_token(kind: str, target: str) -> None:
    """Two blocks of 16 warps are all that a multiprocessor holds: 64 registers for each thread."""
    [product] = Multiply(1, 16, 2, 2).kernels(KINDS[kind], 1) or []
    cubin = compiled(product, target)
    assert cubin.spilled == 0
    assert cubin.registers <= 64


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("kind", ["50%", "2:4", "int8"])
def test_expansion_and_what_belongs_to_it(kind: str, target: str) -> None:
    for needed in Expand().kernels(KINDS[kind], 1024) or []:
        assert compiled(needed, target).spilled == 0, needed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["50%", "2:4", "int8"])
@pytest.mark.parametrize("tokens", [8, 16, 32])
def test_the_first_candidates_of_an_h100(kind: str, tokens: int) -> None:
    ways = candidates(KINDS[kind], tokens, GPUS["H100"])
    few = [way for way in ways if isinstance(way, Multiply)][:2]
    for needed in {needed for way in few for needed in way.kernels(KINDS[kind], tokens) or []}:
        assert compiled(needed, "sm_90").spilled == 0, needed
