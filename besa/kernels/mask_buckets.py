"""Masks a matrix by bucket: each row keeps the buckets from one of its own on.

>>> import torch
>>> weight, buckets = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0, 2, 1]], dtype=torch.uint8)
>>> mask_buckets(weight, buckets, torch.tensor([1], dtype=torch.uint8))
tensor([[0., 2., 3.]])
"""

from __future__ import annotations

from torch import Tensor

from besa.kernels.cuda import buckets as on_gpu


def mask_buckets(weight: Tensor, buckets: Tensor, first_kept: Tensor) -> Tensor:
    """`weight` where `buckets[r, j] >= first_kept[r]`, else zero.

    It records no gradient itself. On a GPU, one kernel reads and writes each matrix once.

    Args:
        weight: [rows, cols], floating point, finite.
        buckets: uint8 [rows, cols].
        first_kept: uint8 [rows].

    Returns:
        A new matrix like `weight`. Zeros may have either sign.
    """
    if on_gpu.serves(weight):
        return on_gpu.mask_buckets(weight, buckets, first_kept)
    return mask_buckets_reference(weight, buckets, first_kept)


def mask_buckets_reference(weight: Tensor, buckets: Tensor, first_kept: Tensor) -> Tensor:
    """`mask_buckets` in plain torch, for any device and floating type."""
    return weight * (buckets >= first_kept.unsqueeze(1))
