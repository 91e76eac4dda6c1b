"""Refuses tensors that hold NaN or Inf: a damaged checkpoint, or a dtype that overflows.

>>> check_finite(torch.tensor([1.0, math.nan]), "norm.weight", "mend the checkpoint")
Traceback (most recent call last):
besa.errors.BesaError: norm.weight has 1 values that are NaN or Inf: mend the checkpoint
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from besa.errors import BesaError


def check_finite(tensor: Tensor, name: str, remedy: str) -> None:
    """Raises a BesaError that names the tensor and the remedy if it holds NaN or Inf."""
    if tensor.is_floating_point() and not math.isfinite(tensor.sum().item()):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise BesaError(f"{name} has {bad} values that are NaN or Inf: {remedy}")
