"""A tensor in a few words, for messages.

>>> import torch
>>> describe(torch.zeros(2, 3))
'torch.float32 [2, 3] on cpu'
"""

from __future__ import annotations

from torch import Tensor


def describe(tensor: Tensor) -> str:
    """Type, shape and device."""
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
