"""The ways that are timed: they fit their GPU, and the best that were measured are among them."""

from __future__ import annotations

import pytest
import torch

from besa.kernels.cuda import matmul
from besa.kernels.cuda.call import Shape
from besa.kernels.cuda.candidates import Gpu, candidates
from besa.kernels.cuda.expansion import Expand
from besa.kernels.cuda.matmul import Matmul
from besa.kernels.cuda.multiply import Multiply
from tests.kernels.cuda.gpus import GPUS

BF16 = torch.bfloat16
H100 = GPUS["H100"]


def shape_of(rows: int, cols: int, kind: str = "50%") -> Shape:
    if kind == "int8":
        return Shape(rows, cols, torch.int8, BF16, False, 768, 0, True)
    return Shape(rows, cols, BF16, BF16, kind == "2:4", 1152 if kind == "2:4" else 1280, 0, False)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("kind", ["50%", "2:4", "int8"])
@pytest.mark.parametrize("tokens", [1, 8, 16, 32, 64, 256, 2048])
def test_they_fit(gpu: Gpu, kind: str, tokens: int) -> None:
    for rows, cols in [(1024, 4096), (11008, 4096), (8192, 28672)]:
        shape = shape_of(rows, cols, kind)
        ways = candidates(shape, tokens, gpu)
        assert ways
        assert len(set(ways)) == len(ways)
        for way in ways:
            assert way.kernels(shape, tokens)
            if isinstance(way, Multiply):
                assert way.resident * (way.shared(shape, tokens) + 1024) <= gpu.shared
                assert way.warps * way.resident <= 32
                assert way.splits == 1 or gpu.capability >= (9, 0)
            if isinstance(way, Matmul):
                assert gpu.capability == matmul.CAPABILITY
        assert tokens <= 16 or Expand() in ways


# Timed on an H100 with some dozen others each (benchmarks/results/gpu-ways.json).
BEST = [
    (4096, 4096, "50%", 1, Multiply(1, 16, 2, 2)),
    (11008, 4096, "50%", 1, Multiply(2, 8, 3, 3)),
    (14336, 4096, "50%", 1, Multiply(1, 4, 2, 8)),
    (14336, 4096, "50%", 8, Multiply(2, 7, 2, 4)),
    (14336, 4096, "50%", 16, Multiply(4, 8, 2, 2)),
    (14336, 4096, "50%", 32, Multiply(4, 6, 2, 2)),
    (8192, 28672, "50%", 1, Multiply(1, 8, 2, 4)),
    (8192, 28672, "50%", 16, Multiply(4, 16, 2, 1)),
    (4096, 4096, "2:4", 8, Multiply(1, 16, 2, 2)),
    (4096, 4096, "int8", 1, Multiply(2, 16, 2, 1)),
    (11008, 4096, "int8", 1, Multiply(2, 8, 3, 3)),
]


@pytest.mark.parametrize(("rows", "cols", "kind", "tokens", "best"), BEST, ids=str)
def test_the_best_are_in(rows: int, cols: int, kind: str, tokens: int, best: Multiply) -> None:
    assert best in candidates(shape_of(rows, cols, kind), tokens, H100)


def test_few_rows_are_shared_by_clusters() -> None:
    """64 row blocks, as of a key projection, are too few for 132 multiprocessors."""
    ways = candidates(shape_of(1024, 4096), 1, H100)
    assert any(isinstance(way, Multiply) and way.splits > 1 for way in ways)
