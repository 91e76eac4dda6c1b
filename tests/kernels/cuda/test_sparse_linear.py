"""The products from records, by the GPU kernels' own source, emulated, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from besa.errors import BesaWarning
from besa.formats import Packed, pack, quantize_int8
from besa.kernels.cuda import linear
from besa.kernels.cuda.call import Call, Way
from besa.kernels.cuda.expansion import Expand, expand
from besa.kernels.cuda.linear import shape_of
from besa.kernels.cuda.multiply import Multiply
from besa.kernels.cuda.records import Records, padded_cols, parts, to_records
from besa.kernels.linear import quantize_rows
from tests.kernels.cuda.emulation import driver_on_cpu

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _emulated() -> Iterator[None]:
    with driver_on_cpu():
        yield


def weight_of(rows: int, cols: int, density: float | str, dtype: torch.dtype) -> Tensor:
    """Uneven rows, an empty row, a full one, and an empty tile; or 2 of 4."""
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    weight = torch.randn(rows, cols, generator=generator)
    if density == "2:4":
        noise = torch.rand(rows, -(-cols // 4), 4, generator=generator)
        return (weight * (noise.argsort(2).argsort(2) < 2).flatten(1)[:, :cols]).to(dtype)
    weight[torch.rand(rows, cols, generator=generator) >= float(density)] = 0
    if rows > 4 and 0 < float(density) < 1:
        weight[1], weight[3] = 0, torch.randn(cols, generator=generator)
        weight[:16, 64:128] = 0
    return weight.to(dtype)


def call_of(
    packed: Packed, x: Tensor, bias: Tensor | None = None, int8_input: bool = True
) -> tuple[Call, Records]:
    records = to_records(*parts(packed), packed.in_features)
    shape = shape_of(records, packed.scale, x.dtype, int8_input)
    assert shape is not None
    cols = packed.in_features
    x = torch.nn.functional.pad(x, (0, padded_cols(cols) - cols)).contiguous()
    y = torch.full((len(x), records.rows), torch.nan, dtype=x.dtype)
    call = Call(shape, records.data, records.offsets, packed.scale, bias, x, y)
    return call, records


def product_of(packed: Packed, x: Tensor, bias: Tensor | None, int8_input: bool) -> Tensor:
    """float64, of activations that are quantized where they shall be."""
    inputs, factor = x.double(), None
    if packed.scale is not None and int8_input:
        whole, scale = quantize_rows(x)
        inputs, factor = whole.double(), scale.double()
    weight = packed.unpack(torch.float32).double()
    result = inputs @ weight.T
    if factor is not None:
        result = result * factor
    return result if bias is None else result + bias.double()


def check(way: Way, packed: Packed, x: Tensor, int8_input: bool = True, bias: bool = True) -> None:
    added = torch.randn(packed.shape[0]).to(x.dtype) if bias else None
    call, _ = call_of(packed, x, added, int8_input)
    if way.kernels(call.shape, len(x)) is None:
        pytest.skip("more shared memory than a block has")
    way.run(call)
    expected = product_of(packed, x, added, int8_input)
    # The result is rounded to 8 or 11 bits; what is expanded of int8, too.
    step = 2.0**-8 if x.dtype == BF16 else 2.0**-11
    largest = expected.abs().amax().clamp(min=1e-30)
    assert ((call.y.double() - expected).abs() <= 2 * step * largest).all()


# Sizes that are no multiple of anything, and densities from nothing to all.
SMALL = [
    (1, 64, 0.5),
    (17, 200, 0.5),
    (40, 333, 0.3),
    (70, 640, 0.9),
    (33, 128, 0.0),
    (16, 64, 1.0),
]
WAYS = [Multiply(1, 4, 3, 2), Multiply(2, 3, 2, 2, splits=3), Multiply(4, 2, 2, 1, splits=2)]
# Each instance takes a C++ compiler seconds: every way and every number of tokens is there, not all
# of their pairs.
CASES = [
    (WAYS[0], 1, BF16),
    (WAYS[0], 7, FP16),
    (WAYS[0], 25, BF16),
    (WAYS[1], 1, FP16),
    (WAYS[1], 16, BF16),
    (WAYS[2], 8, BF16),
    (WAYS[2], 64, BF16),
]


@pytest.mark.parametrize(("way", "tokens", "dtype"), CASES, ids=str)
def test_values(way: Multiply, tokens: int, dtype: torch.dtype) -> None:
    for rows, cols, density in SMALL:
        x = torch.randn(tokens, cols).to(dtype)
        check(way, pack(weight_of(rows, cols, density, dtype)), x, bias=rows != 16)


@pytest.mark.parametrize(("way", "tokens", "dtype"), CASES[1:], ids=str)
def test_two_four(way: Multiply, tokens: int, dtype: torch.dtype) -> None:
    for rows, cols in [(16, 64), (40, 256), (33, 700)]:
        packed = pack(weight_of(rows, cols, "2:4", dtype))
        assert to_records(*parts(packed), cols).two_four
        check(way, packed, torch.randn(tokens, cols).to(dtype))


@pytest.mark.parametrize("int8_input", [True, False], ids=["int8", "float"])
@pytest.mark.parametrize(
    ("way", "tokens", "group_size"),
    [
        (WAYS[0], 1, None),
        (WAYS[1], 9, None),
        (WAYS[1], 1, 32),
        (WAYS[0], 9, 64),
        (WAYS[0], 9, 128),
    ],
    ids=str,
)
def test_int8(way: Multiply, tokens: int, group_size: int | None, int8_input: bool) -> None:
    for rows, cols, density in [(17, 200, 0.5), (40, 640, 0.7), (16, 64, 1.0)]:
        weight = weight_of(rows, cols, density, torch.float32)
        packed = pack(*quantize_int8(weight, group_size), group_size)
        check(way, packed, torch.randn(tokens, cols).to(BF16), int8_input)


@settings(max_examples=25)
@given(
    rows=st.integers(1, 90),
    cols=st.integers(1, 450),
    density=st.sampled_from([0.0, 0.1, 0.4, 0.6, "2:4"]),
    tokens=st.integers(1, 8),
)
def test_any_shape(rows: int, cols: int, density: float | str, tokens: int) -> None:
    x = torch.randn(tokens, cols).to(BF16)
    check(WAYS[0], pack(weight_of(rows, cols, density, BF16)), x)


def test_int8_that_a_block_does_not_quantize_itself() -> None:
    packed = pack(*quantize_int8(weight_of(20, 4096, 0.5, torch.float32)))
    check(Multiply(1, 4, 3, 2), packed, torch.randn(16, 4096).to(BF16))
    check(Multiply(1, 4, 3, 2), packed, torch.randn(16, 4096).to(FP16))


def test_activations_that_are_not_finite() -> None:
    packed = pack(*quantize_int8(weight_of(20, 128, 0.5, torch.float32)))
    x = torch.randn(3, 128).to(BF16)
    x[1, 5], x[2] = torch.inf, 0
    call, _ = call_of(packed, x)
    Multiply(1, 4, 3, 2).run(call)
    assert call.y[0].isfinite().all()
    assert call.y[1].isnan().all()
    assert (call.y[2] == 0).all()


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("density", [0.5, 1.0, 0.0, "2:4"])
def test_expansion_is_exact(
    density: float | str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _Properties)
    for rows, cols in [(16, 64), (40, 200), (100, 640)]:
        weight = weight_of(rows, cols, density, dtype)
        check(Expand(), pack(weight), torch.randn(20, cols).to(dtype))

        call, _ = call_of(pack(weight), torch.zeros(1, cols).to(dtype))
        dense = expand(call, dtype)
        assert torch.equal(dense[:, :cols].view(torch.int16), (weight + 0.0).view(torch.int16))
        assert (dense[:, cols:] == 0).all()


@pytest.mark.parametrize("int8_input", [True, False], ids=["int8", "float"])
@pytest.mark.parametrize("group_size", [None, 32, 128])
def test_expansion_of_int8(
    group_size: int | None, int8_input: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _Properties)
    for rows, cols in [(16, 64), (40, 256), (33, 200)]:
        weight = weight_of(rows, cols, 0.5, torch.float32)
        packed = pack(*quantize_int8(weight, group_size), group_size)
        check(Expand(), packed, torch.randn(20, cols).to(BF16), int8_input)


@pytest.mark.parametrize("group_size", [None, 32, "no int8"])
def test_activations_of_another_type(
    group_size: int | str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _Properties)
    weight, x = weight_of(20, 200, 0.5, torch.float32), torch.randn(3, 200)
    if isinstance(group_size, str):
        packed = pack(weight.to(BF16))
    else:
        packed = pack(*quantize_int8(weight, group_size), group_size)
    records = to_records(*parts(packed), 200)
    linear._say_cast.cache_clear()
    with pytest.warns(BesaWarning, match="activations are float32"):
        y = linear._cast_and_multiplied(x, records, packed.scale, None, True)
    torch.testing.assert_close(y, product_of(packed, x, None, True).float(), rtol=1e-4, atol=1e-4)


def test_expansion_that_stays_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _Properties)
    for rows, cols in [(16, 64), (40, 200)]:
        packed = pack(*quantize_int8(weight_of(rows, cols, 0.5, torch.float32)))
        check(Expand(int8=True), packed, torch.randn(20, cols).to(BF16))
        check(Expand(int8=True), packed, torch.randn(33, cols).to(FP16), bias=False)


class _Properties:
    multi_processor_count = 3
