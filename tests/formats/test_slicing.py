"""Parts of packed weights: what is taken of the packed form is what would be taken of the dense."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from besa.formats import FormatError, Packed, pack, quantize_int8
from besa.formats.slicing import join_rows, stack_rows, take_columns, take_rows

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.int8)


@st.composite
def weights(draw: st.DrawFn, cols: int | None = None) -> Packed:
    rows = draw(st.integers(1, 12))
    cols = cols or draw(st.integers(1, 150))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    weight = torch.randn(rows, cols, generator=generator)
    weight[torch.rand(rows, cols, generator=generator) < draw(st.sampled_from((0, 0.5, 1)))] = 0
    dtype = draw(st.sampled_from(DTYPES))
    if dtype == torch.int8:
        size = draw(st.sampled_from((None, 32)))
        return pack(*quantize_int8(weight, size), group_size=size)
    return pack(weight.to(dtype))


def same(packed: Packed, dense: Tensor) -> None:
    """Sound down to the last bit, and the given weight when unpacked."""
    again = Packed.from_tensors(
        packed.values, packed.bitmask, packed.in_features, packed.scale, packed.group_size
    )
    assert torch.equal(again.row_ptr, packed.row_ptr)
    assert torch.equal(packed.unpack(), dense)


@settings(deadline=None)
@given(st.data())
def test_rows(data: st.DataObject):
    packed = data.draw(weights())
    rows = packed.shape[0]
    picked = data.draw(
        st.one_of(
            st.lists(st.integers(0, rows - 1), max_size=2 * rows),
            st.tuples(st.integers(0, rows), st.integers(0, rows)).map(
                lambda ends: list(range(min(ends), max(ends)))
            ),
        )
    )
    index = torch.tensor(picked, dtype=torch.int64)
    same(take_rows(packed, index), packed.unpack()[index])


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_rows_that_were_taken_are_joined_again(data: st.DataObject):
    packed = data.draw(weights())
    rows = packed.shape[0]
    order = torch.tensor(data.draw(st.permutations(range(rows))))
    cut = data.draw(st.integers(1, rows))
    taken = [part for part in (order[:cut], order[cut:]) if len(part)]
    same(join_rows([take_rows(packed, part) for part in taken], taken), packed.unpack())


@settings(deadline=None)
@given(st.data())
def test_columns(data: st.DataObject):
    packed = data.draw(weights())
    start = data.draw(st.integers(0, packed.in_features))
    stop = data.draw(st.integers(start, packed.in_features))
    if packed.group_size:
        start -= start % packed.group_size
    cut = packed.group_size and stop % packed.group_size and stop != packed.in_features
    if cut:
        with pytest.raises(FormatError, match="cut a group of 32"):
            take_columns(packed, start, stop)
    else:
        same(take_columns(packed, start, stop), packed.unpack()[:, start:stop])


@settings(deadline=None)
@given(st.data())
def test_stacked(data: st.DataObject):
    cols = data.draw(st.integers(1, 150))
    parts = data.draw(st.lists(weights(cols), min_size=1, max_size=4))
    first = parts[0]
    if any(
        (part.values.dtype, part.group_size) != (first.values.dtype, first.group_size)
        for part in parts
    ):
        with pytest.raises(FormatError, match="parts of one weight"):
            stack_rows(parts)
    else:
        same(stack_rows(parts), torch.cat([part.unpack() for part in parts]))


def test_a_run_of_rows_is_a_view():
    packed = pack(torch.randn(8, 40))
    run = take_rows(packed, torch.arange(2, 5))
    assert run.values.untyped_storage().data_ptr() == packed.values.untyped_storage().data_ptr()
    assert run.clone().values.untyped_storage().nbytes() == run.values.nbytes
