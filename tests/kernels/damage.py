"""Packed weights whose parts do not belong together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Of values, bitmask and row pointers of a weight, what is left of them.
Damage = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]

DAMAGES: list[Damage] = [
    lambda values, mask, rows: (values, mask, rows.index_fill(0, torch.tensor([3]), 10**12)),
    lambda values, mask, rows: (values, mask, rows - 7),
    lambda values, mask, rows: (values, mask, rows.flip(0)),
    lambda values, mask, rows: (values[:-30], mask, rows),
    lambda values, mask, rows: (values[:0], mask, rows),
    lambda values, mask, rows: (values, mask ^ 1, rows),
    lambda values, mask, rows: (values, mask | 255, rows),
]
