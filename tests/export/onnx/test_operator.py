"""`ai.besa::SparseMatMul` in ONNX Runtime: the kernels' products, and the same without them."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto
from torch import Tensor

from besa.errors import BesaError
from besa.export.onnx.function import sparse_matmul
from besa.export.onnx.runtime import open_session, ort_library
from besa.formats import Packed, pack, quantize_int4, quantize_int8
from besa.kernels.isa import available
from besa.kernels.linear import sparse_linear_reference

try:
    LIBRARY = ort_library()
except BesaError as error:
    pytest.skip(str(error), allow_module_level=True)

OPSET = 22
TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
}


def tensor(name: str, values: Tensor) -> TensorProto:
    raw = values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return onnx.helper.make_tensor(name, TYPES[values.dtype], list(values.shape), raw, raw=True)


def model(
    packed: Packed, dtype: torch.dtype = torch.float32, function: bool = False, **changes: Tensor
) -> onnx.ModelProto:
    """A graph of one product, whose float32 input and output are `dtype` around it."""
    parts = {"values": packed.values, "bitmask": packed.bitmask}
    if packed.scale is not None:
        parts["scale"] = packed.scale
    if packed.steps is not None:
        parts["steps"] = packed.steps
    parts |= changes
    nodes = [
        onnx.helper.make_node("Cast", ["x"], ["narrow"], to=TYPES[dtype]),
        onnx.helper.make_node(
            "SparseMatMul",
            ["narrow", *parts],
            ["product"],
            domain="ai.besa",
            in_features=packed.in_features,
            group_size=packed.group_size or 0,
        ),
        onnx.helper.make_node("Cast", ["product"], ["y"], to=TensorProto.FLOAT),
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "product",
        [onnx.helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, None, None])],
        [onnx.helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [tensor(name, part) for name, part in parts.items()],
    )
    imports = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid("ai.besa", 1)]
    made = onnx.helper.make_model(graph, opset_imports=imports, ir_version=10)
    if function:
        kind = "int8" if packed.scale is not None else "float"
        made.functions.append(ir.to_proto(sparse_matmul(kind, OPSET)))
    return made


def run(path: Path, made: onnx.ModelProto, x: Tensor, library: str | None = LIBRARY) -> Tensor:
    onnx.save(made, path)
    session = open_session(path, library, threads=2)
    (found,) = session.run(None, {"x": x.numpy()})
    return torch.from_numpy(found)


def weight(rows: int, cols: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Half zeros; a row of zeros alone, and one without any."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, cols, generator=generator)
    dense[torch.rand(rows, cols, generator=generator) < 0.5] = 0
    dense[1] = 0
    dense[2] = 1
    return dense.to(dtype)


def tokens(count: int, cols: int) -> Tensor:
    return torch.randn(2, count, cols, generator=torch.Generator().manual_seed(1))


def expected(packed: Packed, x: Tensor) -> Tensor:
    parts = (packed.values, packed.bitmask, packed.row_ptr, packed.scale)
    return sparse_linear_reference(x, *parts, steps=packed.steps).float()


@pytest.mark.parametrize("count", [1, 3, 40])
@pytest.mark.parametrize("cols", [64, 77])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float_values(tmp_path: Path, dtype: torch.dtype, cols: int, count: int):
    packed = pack(weight(50, cols, dtype))
    x = tokens(count, cols)
    found = run(tmp_path / "model.onnx", model(packed), x)
    torch.testing.assert_close(found, expected(packed, x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("cols", [32, 100, 256])
def test_int8_values(tmp_path: Path, cols: int, group: int | None, count: int):
    packed = pack(*quantize_int8(weight(50, cols), group), group_size=group)
    x = tokens(count, cols)
    found = run(tmp_path / "model.onnx", model(packed), x)
    torch.testing.assert_close(found, expected(packed, x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("group", [None, 32, 64])
@pytest.mark.parametrize("cols", [32, 100, 256])
def test_int4_values(tmp_path: Path, cols: int, group: int | None, count: int):
    numbers, scale, steps = quantize_int4(weight(50, cols), group)
    packed = pack(numbers, scale, group, steps)
    x = tokens(count, cols)
    found = run(tmp_path / "model.onnx", model(packed), x)
    torch.testing.assert_close(found, expected(packed, x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_activations(tmp_path: Path, dtype: torch.dtype):
    packed = pack(weight(20, 64, torch.bfloat16))
    x = tokens(5, 64)
    found = run(tmp_path / "model.onnx", model(packed, dtype), x)
    torch.testing.assert_close(found, expected(packed, x.to(dtype)), rtol=2e-2, atol=2e-2)


def test_a_large_product_on_all_of_the_sessions_threads(tmp_path: Path):
    packed = pack(weight(1500, 1024, torch.bfloat16))
    for count in (1, 70):
        x = tokens(count, 1024)
        found = run(tmp_path / "model.onnx", model(packed), x)
        torch.testing.assert_close(found, expected(packed, x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("isa", available())
def test_every_instruction_set_of_this_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, isa: str
):
    monkeypatch.setenv("BESA_ISA", isa)
    packed = pack(weight(30, 77, torch.bfloat16))
    found = run(tmp_path / "model.onnx", model(packed), tokens(3, 77))
    torch.testing.assert_close(found, expected(packed, tokens(3, 77)), rtol=1e-5, atol=1e-4)


def test_an_instruction_set_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    packed = pack(weight(30, 77))
    monkeypatch.setenv("BESA_ISA", "sse9")
    with pytest.raises(BesaError, match="BESA_ISA names no instruction set that this CPU has"):
        run(tmp_path / "model.onnx", model(packed), tokens(3, 77))


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("cols", [32, 77])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int8 in groups"])
def test_the_function_means_the_same_without_the_library(
    tmp_path: Path, kind: str, cols: int, count: int
):
    group = 32 if "groups" in kind else None
    if kind.startswith("int8"):
        packed = pack(*quantize_int8(weight(20, cols), group), group_size=group)
    else:
        packed = pack(weight(20, cols, getattr(torch, kind)))
    x = tokens(count, cols)
    found = run(tmp_path / "model.onnx", model(packed, function=True), x, library=None)
    torch.testing.assert_close(found, expected(packed, x), rtol=1e-4, atol=1e-3)


def test_a_token_of_zeros_is_no_division_by_zero(tmp_path: Path):
    packed = pack(*quantize_int8(weight(20, 64)))
    x = torch.zeros(1, 2, 64)
    for library in (LIBRARY, None):
        found = run(tmp_path / "model.onnx", model(packed, function=True), x, library)
        assert torch.equal(found, torch.zeros(1, 2, 20))


def test_the_kernel_serves_where_the_function_is_there_too(tmp_path: Path):
    """Its sums have an order of their own: to the last bit, only the kernel gives the kernel's."""
    packed = pack(weight(64, 1000))
    x = tokens(4, 1000)
    kernel = run(tmp_path / "kernel.onnx", model(packed), x)
    both = run(tmp_path / "both.onnx", model(packed, function=True), x)
    function = run(tmp_path / "function.onnx", model(packed, function=True), x, library=None)
    assert torch.equal(kernel, both)
    assert not torch.equal(kernel, function)


def damages() -> dict[str, dict[str, Tensor]]:
    packed = pack(weight(20, 77))
    quantized = pack(*quantize_int8(weight(20, 77)))
    numbers, scale, steps = quantize_int4(weight(20, 77))
    four = pack(numbers, scale, steps=steps)
    whole = {"values": four.values, "bitmask": four.bitmask, "scale": scale}
    stray = packed.bitmask.clone()
    stray[3, -1] |= 0x80  # column 79 of 77
    return {
        "one value too few": {"values": packed.values[:-1]},
        "one value too many": {"values": torch.cat([packed.values, torch.ones(1)])},
        "a bit past the last column": {"bitmask": stray},
        "a bitmask of another width": {"bitmask": packed.bitmask[:, :-1]},
        "scales for floats": {"scale": torch.ones(20, 1)},
        "int8 without scales": {"values": quantized.values, "bitmask": quantized.bitmask},
        "int4 without steps": whole,
        "int4 with steps of groups": {**whole, "steps": steps.repeat(1, 2)},
        "int4 with a byte too few": {**whole, "values": four.values[:-1], "steps": steps},
    }


@pytest.mark.parametrize("what", damages())
def test_a_damaged_weight_is_refused_when_it_is_loaded(tmp_path: Path, what: str):
    with pytest.raises(BesaError, match="SparseMatMul: ") as caught:
        run(tmp_path / "model.onnx", model(pack(weight(20, 77)), **damages()[what]), tokens(1, 77))
    assert "\n" not in str(caught.value)


def test_activations_of_another_width(tmp_path: Path):
    with pytest.raises(Exception, match="X does not have in_features columns"):
        run(tmp_path / "model.onnx", model(pack(weight(20, 77))), tokens(1, 76))


def test_a_library_that_is_none(tmp_path: Path):
    onnx.save(model(pack(weight(4, 8))), tmp_path / "model.onnx")
    maps = Path("/proc/self/maps").read_text().splitlines()
    libm = next(line.split()[-1] for line in maps if "libm" in line and ".so" in line)
    with pytest.raises(BesaError, match=r"does not fit ONNX Runtime \d.*RegisterCustomOps"):
        open_session(tmp_path / "model.onnx", libm)


def test_an_older_onnx_runtime_is_told_by_its_version():
    """One that has the first version of the interface, and not the one that besa needs."""
    words: list[bytes] = []
    make_status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(
        lambda code, message: words.append(message) or 4096 + code
    )
    first = (ctypes.c_void_p * 1)(ctypes.cast(make_status, ctypes.c_void_p))  # CreateStatus
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(
        lambda version: ctypes.addressof(first) if version == 1 else None
    )
    version = ctypes.create_string_buffer(b"1.9.0")
    get_version = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(version))
    base = (ctypes.c_void_p * 2)(
        ctypes.cast(get_api, ctypes.c_void_p), ctypes.cast(get_version, ctypes.c_void_p)
    )
    library = ctypes.CDLL(LIBRARY)
    library.RegisterCustomOps.restype = ctypes.c_void_p
    assert library.RegisterCustomOps(None, ctypes.byref(base)) == 4096 + 1
    assert words == [b"besa's operator needs ONNX Runtime 1.17 or newer, and this is 1.9.0"]


def test_the_library_is_found_by_its_path(monkeypatch: pytest.MonkeyPatch):
    import besa.export
    import besa.kernels

    assert Path(besa.export.ort_library()).is_file()
    monkeypatch.setattr(besa.kernels, "__path__", ["/nowhere"])
    monkeypatch.delenv("BESA_ORT_LIBRARY", raising=False)
    with pytest.raises(BesaError, match="libonnxruntime-dev"):
        besa.export.ort_library()


def test_numbers_of_an_empty_batch(tmp_path: Path):
    found = run(tmp_path / "model.onnx", model(pack(weight(20, 64))), torch.zeros(0, 3, 64))
    assert found.shape == (0, 3, 20)
    assert np.asarray(found).dtype == np.float32
