"""Which N of every M neighbours have the highest scores, on a GPU: the launch of n_of_m.cu.

`besa.pruning.patterns.n_of_m` says what is computed, and calls this where it serves.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from besa.kernels.cuda import driver
from besa.kernels.cuda.usable import usable

# Of n_of_m.cu.
GROUPS = (2, 4, 8)
_THREADS = 256
_PIECE = 8 * _THREADS


class _Choice(ctypes.Structure):
    _fields_ = [
        ("scores", c_void_p),
        ("mask", c_void_p),
        ("count", c_int64),
        ("n", c_int32),
    ]


def serves(scores: Tensor, m: int) -> bool:
    """Whether the kernel takes scores of this type and groups of `m`, on this device."""
    return m in GROUPS and scores.dtype == torch.float32 and usable(scores.device)


def n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """`besa.pruning.patterns.n_of_m`."""
    assert scores.shape[1] % m == 0
    scores = scores.contiguous()
    if scores.data_ptr() % 16:
        scores = scores.clone()
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if mask.numel() == 0:
        return mask
    arguments = _Choice(scores.data_ptr(), mask.data_ptr(), scores.numel(), n)
    kernel = driver.kernel("n_of_m.cu", f"n_of_m<{m}>", scores.device)
    pieces, stream = -(-scores.numel() // _PIECE), driver.stream(scores.device)
    kernel.launch((pieces, 1, 1), _THREADS, 0, arguments, stream)
    return mask
