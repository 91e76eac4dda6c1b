"""The operator's product on a GPU, through its own driver: see test_cuda_product.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from besa.export.onnx.machine_code import instances, machine_code
from besa.formats import Packed, pack, quantize_int8
from besa.kernels.cuda import compiler
from besa.kernels.cuda.records import parts, to_records
from tests.export.onnx.cuda_on_cpu import multiply, product_library
from tests.kernels.cuda.emulation import needs_compiler

pytestmark = [
    needs_compiler,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.skipif(compiler.nvrtc() is None, reason="no NVRTC"),
]

BF16, FP16 = torch.bfloat16, torch.float16
ROWS, COLS = 1000, 2048
KINDS = {"fp16": FP16, "bf16": BF16, "2:4": FP16, "int8": FP16, "int8 32": BF16, "int8 128": FP16}


def weight_of(kind: str) -> Packed:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(ROWS, COLS, generator=generator) * 0.02
    noise = torch.rand(ROWS, COLS, generator=generator)
    if kind == "2:4":
        ranks = noise.unflatten(1, (-1, 4)).argsort(2).argsort(2)
        return pack((weight * (ranks < 2).flatten(1)).to(FP16))
    weight[noise < 0.5] = 0
    if not kind.startswith("int8"):
        return pack(weight.to(KINDS[kind]))
    group = {"int8 32": 32, "int8 128": 128}.get(kind)
    return pack(*quantize_int8(weight, group), group)


@pytest.mark.parametrize("kind", KINDS)
def test_products(kind: str) -> None:
    """On a stream, and in a CUDA graph that is captured before any kernel is loaded."""
    dtype, packed = KINDS[kind], weight_of(kind)
    records = to_records(*parts(packed), COLS)
    code = machine_code(instances(records, packed.group_size, dtype))
    on_gpu = replace(
        records,
        data=records.data.cuda(),
        offsets=None if records.offsets is None else records.offsets.cuda(),
    )
    scale = None if packed.scale is None else packed.scale.cuda()
    weight = packed.unpack(torch.float32).cuda().double()
    library = product_library("libcuda.so.1")

    def run(x: Tensor, y: Tensor) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        multiply(library, on_gpu, scale, packed.group_size, code, x, y, stream)

    for tokens in (1, 8, 9, 17, 33, 64, 200):
        x = torch.randn(tokens, COLS, device="cuda").to(dtype)
        expected = x.double() @ weight.T
        captured = torch.full((tokens, ROWS), torch.nan, dtype=dtype, device="cuda")
        plain = captured.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(x, captured)
        graph.replay()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            run(x, plain)
        torch.cuda.synchronize()
        for y in (captured, plain):
            error = (y.double() - expected).norm() / expected.norm()
            assert error < (3e-3 if dtype == BF16 else 4e-4), (tokens, error)
        assert torch.equal(captured, plain)
