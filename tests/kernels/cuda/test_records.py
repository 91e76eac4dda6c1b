"""Packed weights as records and back, bit for bit, and how much memory records take."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from besa.formats import Packed, pack, quantize_int8
from besa.kernels.cuda import records as module
from besa.kernels.cuda.records import Records, parts, to_packed, to_records
from tests.helpers import same_bytes

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


def packed_of(rows: int, cols: int, density: float, values: str, seed: int = 0) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    weight[torch.rand(rows, cols, generator=generator) >= density] = 0
    return pack(*quantize_int8(weight)) if values == "int8" else pack(weight.to(TYPES[values]))


def two_of_four(rows: int, cols: int) -> torch.Tensor:
    noise = torch.rand(rows, -(-cols // 4), 4)
    keep = noise.argsort(2).argsort(2) < torch.randint(0, 3, (rows, -(-cols // 4), 1))
    return torch.randn(rows, cols) * keep.flatten(1)[:, :cols]


def same(records: Records, packed: Packed) -> bool:
    back = to_packed(records)
    return all(
        a.dtype == b.dtype and same_bytes(a, b) for a, b in zip(back, parts(packed), strict=True)
    )


@given(
    rows=st.integers(0, 150),
    cols=st.integers(0, 300),
    density=st.floats(0, 1),
    values=st.sampled_from(list(TYPES)),
    seed=st.integers(0, 99),
)
def test_there_and_back(rows: int, cols: int, density: float, values: str, seed: int) -> None:
    packed = packed_of(rows, cols, density, values, seed)
    assert same(to_records(*parts(packed), cols), packed)


@given(
    rows=st.integers(1, 100), cols=st.integers(1, 300), chunk=st.sampled_from([1, 5000, 1 << 22])
)
def test_two_of_four(rows: int, cols: int, chunk: int) -> None:
    """Also of fewer than two, and in any number of steps."""
    packed = pack(two_of_four(rows, cols).bfloat16())
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(module, "_CHUNK", chunk)
        records = to_records(*parts(packed), cols)
        assert records.two_four
        assert same(records, packed)


def test_special_values() -> None:
    """NaN's bits, infinities and denormals are kept; -0.0, which only a file may have, too."""
    bits = torch.randint(-0x8000, 0x8000, (40, 128), dtype=torch.int16)
    bits[bits & 0x7FFF == 0] = 1
    bits[torch.rand(bits.shape) < 0.4] = 0
    packed = pack(bits.view(torch.bfloat16))
    assert same(to_records(*parts(packed), 128), packed)
    two = pack(two_of_four(16, 64).bfloat16())
    two.values[3] = -0.0
    records = to_records(*parts(two), 64)
    assert not records.two_four
    assert same(records, two)


def test_three_of_four_is_no_pattern() -> None:
    weight = two_of_four(16, 64)
    weight[7, 20:23] = 1
    assert not to_records(*parts(pack(weight.bfloat16())), 64).two_four


@pytest.mark.parametrize(
    ("density", "values"),
    [(0.5, "bfloat16"), (0.3, "float16"), (0.2, "bfloat16"), (0.5, "int8"), (0.3, "int8")],
)
def test_memory(density: float, values: str) -> None:
    packed = packed_of(1024, 2048, density, values)
    kept = packed.values.nbytes + packed.bitmask.nbytes
    assert to_records(*parts(packed), 2048).nbytes <= 1.03 * kept


def test_float32_has_no_records() -> None:
    with pytest.raises(ValueError, match="float32"):
        to_records(*parts(pack(torch.ones(2, 8))), 8)
