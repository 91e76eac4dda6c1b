"""The operator for NVIDIA GPUs: machine code, and its product run on the CPU, against float64."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from ctypes import c_int, c_long
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from besa.errors import BesaError
from besa.export.onnx.machine_code import (
    ARCHITECTURES,
    SIZES,
    Instance,
    instances,
    machine_code,
    need_nvrtc,
    read_table,
)
from besa.formats import Packed, pack, quantize_int8
from besa.kernels.cuda import compiler
from besa.kernels.cuda.call import Shape
from besa.kernels.cuda.multiply import Multiply
from besa.kernels.cuda.records import Records, parts, to_records
from tests.export.onnx.cuda_on_cpu import Weight, driver_on_cpu, multiply, product_library
from tests.kernels.cuda.emulation import guarded, needs_compiler

BF16, FP16 = torch.bfloat16, torch.float16
ROWS, COLS = 40, 256

needs_nvrtc = pytest.mark.skipif(compiler.nvrtc() is None, reason="no NVRTC")
pytestmark = [needs_compiler, needs_nvrtc]


def weight_of(kind: str, rows: int = ROWS, cols: int = COLS) -> Packed:
    """With an empty row, a full one, and a tile of zeros."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(rows, cols, generator=generator)
    if kind == "2:4":
        ranks = torch.rand(rows, cols // 4, 4, generator=generator).argsort(2).argsort(2)
        return pack((weight * (ranks < 2).flatten(1)).to(BF16))
    weight[torch.rand(rows, cols, generator=generator) < 0.5] = 0
    weight[1], weight[3] = 0, torch.randn(cols, generator=generator)
    weight[:16, 64:128] = 0
    if kind == "values":
        return pack(weight.to(FP16))
    group = {"int8": None, "int8 32": 32, "int8 128": 128}[kind]
    return pack(*quantize_int8(weight, group), group)


KINDS = {"values": FP16, "2:4": BF16, "int8": FP16, "int8 32": FP16, "int8 128": BF16}


def needed(kind: str) -> tuple[Packed, Records, list[Instance]]:
    packed = weight_of(kind)
    records = to_records(*parts(packed), packed.in_features)
    return packed, records, instances(records, packed.group_size, KINDS[kind])


@pytest.fixture(scope="module")
def all_instances() -> list[Instance]:
    return [one for kind in KINDS for one in needed(kind)[2]]


@pytest.fixture(scope="module")
def code(all_instances: list[Instance]) -> bytes:
    return machine_code(all_instances)


@pytest.fixture(scope="module")
def driver_path(all_instances: list[Instance]) -> Path:
    return driver_on_cpu(all_instances)


@pytest.fixture
def driver(driver_path: Path) -> Iterator[Any]:
    """The driver's own view of what it was asked for."""
    library = ctypes.CDLL(str(driver_path))

    def variable(name: str, kind: Any = c_int) -> Any:
        return kind.in_dll(library, name)

    capability = variable("capability", c_int * 2)
    yield SimpleNamespace(path=driver_path, capability=capability, variable=variable)
    capability[:] = [9, 0]
    variable("shared_opt_in").value = 232448
    variable("first_context", c_long).value = 1000
    variable("failing_launch").value = 0


def product(
    driver: Any, kind: str, code: bytes, tokens: int, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """The product, and what it should be; for arguments see `multiply`."""
    packed, records, _ = needed(kind)
    dtype = KINDS[kind]
    x = guarded(torch.randn(tokens, COLS, generator=torch.Generator().manual_seed(1)).to(dtype))
    y = guarded(torch.full((tokens, ROWS), torch.nan, dtype=dtype))
    library, scale, group = product_library(driver.path), packed.scale, packed.group_size
    multiply(library, records, scale, group, code, x, y, **arguments)
    return y, x.double() @ packed.unpack(torch.float32).double().T


@pytest.mark.parametrize("tokens", [1, 9, 20, 40, 64 + 5])
@pytest.mark.parametrize("kind", KINDS)
def test_products(driver: Any, code: bytes, kind: str, tokens: int) -> None:
    y, expected = product(driver, kind, code, tokens)
    step = 2.0**-8 if y.dtype == BF16 else 2.0**-11
    assert ((y.double() - expected).abs() <= 2 * step * expected.abs().amax()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_as_torchs_operator_launches_them(driver: Any, code: bytes, kind: str) -> None:
    packed, records, wanted = needed(kind)
    capacity, group, dtype = records.capacity, packed.group_size or 0, KINDS[kind]
    shape = Shape(ROWS, COLS, records.dtype, dtype, records.two_four, capacity, group, False)
    for one in wanted:
        product(driver, kind, code, one.tokens)
        way = Multiply(1, one.warps, one.stages, one.resident)
        assert one.name == way.name(shape, one.tokens)
        assert driver.variable("launched_shared").value == way.shared(shape, one.tokens)
        assert driver.variable("launched_threads").value == 32 * one.warps
        assert driver.variable("launched_grid").value == -(-ROWS // 16)


def test_long_inputs_go_in_pieces_of_64(driver: Any, code: bytes) -> None:
    before = driver.variable("launches").value
    y, expected = product(driver, "values", code, 64 + 64 + 3)
    torch.testing.assert_close(y.double(), expected, rtol=1e-3, atol=0.05)
    count = driver.variable("launches").value - before
    tokens = driver.variable("launched_tokens", c_int * 64)
    assert [tokens[(before + i) % 64] for i in range(count)] == [64, 64, 3]


def test_no_tokens_are_no_launch(driver: Any, code: bytes) -> None:
    before = driver.variable("launches").value
    assert product(driver, "values", code, 0)[0].shape == (0, ROWS)
    assert driver.variable("launches").value == before


def test_code_is_loaded_once_and_while_a_graph_is_captured(driver: Any, code: bytes) -> None:
    before = driver.variable("loads").value
    product(driver, "values", code, 1, stream=1001, times=3)
    product(driver, "values", code, 1, stream=1001)
    assert driver.variable("loads").value - before == len(SIZES)
    assert driver.variable("load_capture_mode").value == 2  # relaxed


def test_the_streams_context_is_the_threads_meanwhile(driver: Any, code: bytes) -> None:
    """Another GPU's, or none: a thread that ONNX Runtime did not start."""
    for first in (1000, 0):
        driver.variable("first_context", c_long).value = first
        product(driver, "values", code, 1, stream=1001)
        assert driver.variable("launched_context", c_long).value == 1001
        assert driver.variable("launched_stream", c_long).value == 1001
    with pytest.raises(BesaError, match="this thread has no GPU"):
        product(driver, "values", code, 1)


@pytest.mark.parametrize(
    ("capability", "chosen"), [((9, 0), 90), ((8, 7), 86), ((8, 9), 89), ((12, 1), 120)]
)
def test_the_gpus_own_architecture(
    driver: Any, code: bytes, capability: tuple[int, int], chosen: int
) -> None:
    """The newest whose code runs there: all others' machine code is made unusable."""
    entries = read_table(code)
    if chosen not in {entry.architecture for entry in entries}:
        pytest.skip("this NVRTC does not know it")
    spoiled = bytearray(code)
    for entry in entries:
        if entry.architecture != chosen:
            spoiled[entry.image_at : entry.image_at + 4] = b"none"
    driver.capability[:] = capability
    product(driver, "values", bytes(spoiled), 1, stream=1001)


def test_a_gpu_that_there_is_no_code_for(driver: Any, code: bytes) -> None:
    for capability in ([7, 5], [9, 0]):
        driver.capability[:] = capability
        known = [entry for entry in read_table(code) if entry.architecture != 90]
        some = bytearray(code)
        struct.pack_into("<I", some, 12, len(known))
        for i, entry in enumerate(known):
            struct.pack_into("<10I3Q", some, 16 + 64 * i, *astuple(entry))
        with pytest.raises(BesaError, match=r"no machine code for .*, only for sm_80, .*: export"):
            product(driver, "values", bytes(some), 1)


def test_a_driver_that_is_too_old(driver: Any, code: bytes) -> None:
    spoiled = bytearray(code)
    for entry in read_table(code):
        spoiled[entry.image_at : entry.image_at + 4] = b"new!"
    with pytest.raises(BesaError, match="driver is too old for the model's machine code: update"):
        product(driver, "values", bytes(spoiled), 1)


def test_less_shared_memory_than_a_kernel_needs(driver: Any, code: bytes) -> None:
    driver.variable("shared_opt_in").value = 20_000
    with pytest.raises(BesaError, match=r"compute capability 9\.0 has no kernel for this weight"):
        product(driver, "values", code, 1)


def test_a_driver_that_refuses(driver: Any, code: bytes) -> None:
    driver.variable("failing_launch").value = 719
    with pytest.raises(BesaError, match="Mul: CUDA_ERROR_LAUNCH_FAILED: could not launch"):
        product(driver, "values", code, 1)
    driver.variable("failing_launch").value = 4242
    with pytest.raises(BesaError, match="CUDA error 4242"):
        product(driver, "values", code, 1)


def test_no_driver() -> None:
    _, records, _ = needed("values")
    library = product_library("libcuda-is-not-here.so")
    x = torch.zeros(1, COLS, dtype=FP16)
    with pytest.raises(BesaError) as caught:
        multiply(library, records, None, None, b"", x, x)
    said = "SparseMatMul: no NVIDIA driver is installed (libcuda-is-not-here.so)"
    assert str(caught.value) == said


DAMAGES = {
    "rows": ("values", {"rows": 80}),
    "no rows": ("values", {"rows": 0}),
    "cols": ("values", {"cols": 320}),
    "cols that are no tiles": ("values", {"cols": 250}),
    "capacity": ("values", {"capacity": 4096}),
    "an odd capacity": ("values", {"capacity": 1000}),
    "bytes": ("values", {"record_bytes": 1 << 20}),
    "few bytes": ("values", {"record_bytes": 64}),
    "bytes of 2:4": ("2:4", {"record_bytes": 1152}),
    "capacity of 2:4": ("2:4", {"capacity": 1168}),
    "group size": ("int8 32", {"group_size": 16}),
    "other scales": ("int8 32", {"group_size": 64}),
    "few scales": ("int8", {"scales": 3}),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_records(driver: Any, code: bytes, what: str) -> None:
    kind, changes = DAMAGES[what]

    def change(weight: Weight) -> None:
        for name, value in changes.items():
            setattr(weight, name, value)

    with pytest.raises(BesaError, match="SparseMatMul: the records are damaged: "):
        product(driver, kind, code, 1, change=change)


def test_damaged_machine_code(driver: Any, code: bytes) -> None:
    for damaged, words in [
        (b"", "is damaged"),
        (b"X" + code[1:], "is damaged"),
        (code[:8] + b"\x02" + code[9:], "is of another version"),
        (code[:40], "is cut off"),
        (code[: len(code) // 2], "is cut off"),
    ]:
        with pytest.raises(BesaError, match=f"the machine code {words}"):
            product(driver, "values", damaged, 1)


def test_the_table(code: bytes, all_instances: list[Instance]) -> None:
    """Each instance once for each architecture, with its own name in its own machine code."""
    nvrtc = compiler.nvrtc()
    assert nvrtc is not None
    known = [one for one in ARCHITECTURES if one in nvrtc.architectures]
    entries = read_table(code)
    assert len(entries) == len(known) * len(set(all_instances))
    assert {entry.architecture for entry in entries} == set(known)
    for entry in entries:
        image = code[entry.image_at : entry.image_at + entry.image_bytes]
        name = code[entry.name_at : entry.name_at + entry.name_bytes]
        assert image.startswith(b"\x7fELF")
        assert name.startswith(b"_Z8multiply")
        assert name in image
        assert entry.image_at % 16 == 0
    assert machine_code(reversed(all_instances)) == code
    with pytest.raises(BesaError, match="no machine code of besa's"):
        read_table(b"\0" * 100)


def test_weights_whose_records_are_long_get_by_with_less(all_instances: list[Instance]) -> None:
    """What the GPUs with least shared memory can launch: 99 KB a block."""
    dense = pack(torch.ones(16, 64).to(FP16))
    records = to_records(*parts(dense), 64)
    assert records.capacity == 128 + 2048
    for one in instances(records, None, FP16):
        assert 80 + one.warps * one.stages * records.capacity <= 99 * 1024
    assert {one.stages for one in all_instances} == {3}
    longest = replace(records, capacity=2 * 512)
    assert {one.pieces for one in instances(longest, None, FP16)} == {2}


@pytest.mark.slow
def test_nothing_spills() -> None:
    """Registers suffice, for all architectures."""
    from besa.export.onnx.machine_code import _compile

    nvrtc = compiler.nvrtc()
    assert nvrtc is not None
    for kind in KINDS:
        for one in needed(kind)[2]:
            for architecture in ARCHITECTURES:
                if architecture in nvrtc.architectures:
                    assert _compile((architecture, one)).spilled == 0, (architecture, one.name)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "nvrtc", lambda: None)
    with pytest.raises(BesaError, match=r"--device cuda needs NVRTC .*: pip install") as caught:
        need_nvrtc()
    assert "\n" not in str(caught.value)
