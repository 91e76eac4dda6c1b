"""int4 numbers in nibbles: there and back, and as the layout says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from besa.kernels import nibbles


def numbers(rows: int, cols: int, seed: int) -> Tensor:
    """Whole numbers from -7 to 7, of rows that have from no zeros to nothing else."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-7, 8, (rows, cols), generator=generator, dtype=torch.int8)
    rates = torch.rand(rows, 1, generator=generator)
    return weight.masked_fill(torch.rand(rows, cols, generator=generator) < rates, 0)


def packed_by_hand(weight: Tensor) -> tuple[list[int], list[int]]:
    """The bytes and where each row begins, one number at a time."""
    values, pointers = [], [0]
    for row in weight.tolist():
        low = [number for j, number in enumerate(row) if number and j // 64 % 2 == 0]
        high = [number for j, number in enumerate(row) if number and j // 64 % 2 == 1]
        for i in range(max(len(low), len(high))):
            byte = low[i] % 16 if i < len(low) else 0
            byte += 16 * (high[i] % 16) if i < len(high) else 0
            values.append(byte)
        pointers.append(len(values))
    return values, pointers


@settings(deadline=None)
@given(st.integers(0, 6), st.integers(0, 400), st.integers(0, 10_000))
def test_there_and_back(rows: int, cols: int, seed: int):
    weight = numbers(rows, cols, seed)
    values, bitmask, row_ptr = nibbles.pack(weight)
    assert (values.tolist(), row_ptr.tolist()) == packed_by_hand(weight)
    assert torch.equal(nibbles.row_pointers(bitmask), row_ptr)
    assert nibbles.count(bitmask) == int((weight != 0).sum())
    assert torch.equal(nibbles.unpack(values, bitmask, row_ptr, cols), weight)


def test_in_pieces(monkeypatch: pytest.MonkeyPatch):
    weight = numbers(40, 200, seed=0)
    expected = nibbles.pack(weight)
    monkeypatch.setattr(nibbles, "_CHUNK", 600)
    assert all(map(torch.equal, nibbles.pack(weight), expected))
    assert torch.equal(nibbles.unpack(*expected, 200), weight)


def test_steps_are_of_groups_of_columns():
    weight = numbers(5, 200, seed=1)
    steps = torch.randint(1, 19, (5, 4), generator=torch.Generator().manual_seed(0))
    found = nibbles.expand(*nibbles.pack(weight), steps.to(torch.uint8), 200)
    expected = weight * steps.repeat_interleave(64, 1)[:, :200]
    assert torch.equal(found.long(), expected)


def test_the_padding_is_small():
    weight = torch.randint(-7, 8, (64, 4096), generator=torch.Generator().manual_seed(0))
    kept = torch.rand(64, 4096, generator=torch.Generator().manual_seed(1)) < 0.5
    values, _, _ = nibbles.pack((weight * kept).to(torch.int8))
    assert 2 * values.numel() < 1.03 * int(((weight * kept) != 0).sum())


def test_a_number_of_more_bits():
    with pytest.raises(ValueError, match="from -7 to 7"):
        nibbles.pack(torch.tensor([[8]], dtype=torch.int8))


def test_parts_that_disagree():
    values, bitmask, row_ptr = nibbles.pack(numbers(4, 100, seed=0))
    for damaged in (
        (values[:-1], bitmask, row_ptr),
        (values, bitmask ^ 0xFF, row_ptr),
        (values, bitmask, row_ptr + 1),
    ):
        with pytest.raises(ValueError, match="do not belong together"):
            nibbles.unpack(*damaged, 100)
