"""Weights of four bits: what rounding keeps and costs, and the way to eight bits and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from besa.formats import FormatError, Packed, pack, quantize_int4
from besa.formats.int4 import in_eight_bits, in_four_bits
from besa.formats.slicing import stack_rows, take_columns, take_rows

GROUPS = (None, 32, 64, 128)


def sparse_weight(rows: int, cols: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    return weight * (torch.rand(rows, cols, generator=generator) < 0.5)


def packed(weight: Tensor, group_size: int | None = None) -> Packed:
    numbers, scale, steps = quantize_int4(weight, group_size)
    return pack(numbers, scale, group_size, steps)


@settings(deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 300),
    st.sampled_from(GROUPS),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.integers(0, 1000),
)
def test_what_is_rounded_stays(
    rows: int, cols: int, group_size: int | None, dtype: torch.dtype, seed: int
):
    """Where a weight of each group has the largest number, as pruning leaves them."""
    generator = torch.Generator().manual_seed(seed)
    numbers = (7 * sparse_weight(rows, cols, seed)).round().clamp(-7, 7).to(torch.int8)
    groups = 1 if group_size is None else -(-cols // group_size)
    numbers[:, :: group_size or cols] = 7
    steps = torch.randint(1, 19, (rows, groups), generator=generator).to(torch.uint8)
    steps[:, 0] = 18
    scale = torch.rand(rows, 1, generator=generator).to(dtype).float() / 126 + 1e-4
    weight = pack(numbers, scale, group_size, steps).unpack(dtype)
    found = quantize_int4(weight, group_size)
    assert torch.equal(found[0], numbers)
    assert torch.equal(found[2], steps)
    torch.testing.assert_close(found[1], scale, rtol=2**-8, atol=0)


@settings(deadline=None)
@given(st.integers(0, 5), st.integers(0, 300), st.sampled_from(GROUPS), st.integers(0, 1000))
def test_zeros_stay_zeros(rows: int, cols: int, group_size: int | None, seed: int):
    weight = sparse_weight(rows, cols, seed)
    found = packed(weight, group_size).unpack()
    assert found.shape == weight.shape
    assert (found[weight == 0] == 0).all()


@pytest.mark.parametrize("group_size", GROUPS)
def test_the_error_is_less_than_without_clips(group_size: int | None):
    weight = sparse_weight(64, 512)
    found = float((packed(weight, group_size).unpack() - weight).square().sum())
    plain = 0.0
    for group in weight.split(group_size or 512, 1):
        step = group.abs().amax(1, keepdim=True) / 7
        plain += float(((group / step).round() * step - group).square().sum())
    assert found < 0.97 * plain


def test_smaller_groups_have_less_error():
    weight = sparse_weight(64, 512)
    errors = [float((packed(weight, g).unpack() - weight).square().sum()) for g in (128, 64, 32)]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("group_size", GROUPS)
def test_eight_bits_are_the_same_weight(group_size: int | None):
    four = packed(sparse_weight(20, 200), group_size)
    eight = in_eight_bits(four)
    assert eight.values.dtype == torch.int8
    assert torch.equal(eight.unpack(), four.unpack())
    assert four.steps is not None
    back = in_four_bits(eight, four.steps, group_size)
    for one, other in zip(back.to("cpu").__dict__.values(), four.__dict__.values(), strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_half_the_bytes_of_eight_bits():
    four = packed(sparse_weight(64, 4096), 128)
    assert four.nbytes < 3.25 / 8 * 64 * 4096
    assert four.density == in_eight_bits(four).density


def test_slices():
    four = packed(sparse_weight(20, 256), 64)
    dense = four.unpack()
    rows = torch.tensor([3, 1, 7])
    assert torch.equal(take_rows(four, torch.arange(4, 9)).unpack(), dense[4:9])
    assert torch.equal(take_rows(four, rows).unpack(), dense[rows])
    assert torch.equal(take_columns(four, 64, 256).unpack(), dense[:, 64:])
    both = stack_rows([take_rows(four, rows), take_rows(four, torch.arange(2))])
    assert torch.equal(both.unpack(), torch.cat([dense[rows], dense[:2]]))
    with pytest.raises(FormatError, match="cut a group of 64"):
        take_columns(four, 32, 256)


def test_rows_of_zeros():
    weight = torch.zeros(3, 64)
    weight[1, 5] = -2.0
    found = packed(weight, 32)
    assert torch.equal(found.unpack(), weight)
    assert found.nonzeros == 1


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_has_no_whole_number(wrong: float):
    with pytest.raises(ValueError, match="a NaN or an infinity"):
        quantize_int4(torch.tensor([[1.0, wrong]]))


def test_parts_that_are_no_weight():
    four = packed(sparse_weight(8, 128), 64)
    parts = {
        "values": four.values,
        "bitmask": four.bitmask,
        "in_features": 128,
        "scale": four.scale,
        "group_size": 64,
        "steps": four.steps,
    }
    assert torch.equal(Packed.from_tensors(**parts).unpack(), four.unpack())
    assert four.steps is not None
    for change, words in (
        ({"steps": None}, "steps go with int4 values"),
        ({"steps": four.steps + 18}, "steps has an element above 18"),
        ({"steps": four.steps[:, :1]}, r"steps is .*, not torch.uint8 \[8, 2\]"),
        ({"scale": None}, "scale is missing"),
        ({"scale": four.scale.expand(8, 2).contiguous()}, r"scale is .*\[8, 1\]"),
        ({"values": four.values[:-1]}, "but .* by bitmask"),
        ({"values": four.values.view(torch.int8)}, "steps go with int4 values"),
    ):
        with pytest.raises(FormatError, match=words):
            Packed.from_tensors(**{**parts, **change})
