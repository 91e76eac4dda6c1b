"""A block of columns of SparseGPT on a GPU, in one launch: the launch of compensate.cu.

`besa.pruning.compensate` says what is computed, and calls this where it serves.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from besa.kernels.cuda import driver
from besa.kernels.cuda.usable import usable

# Of compensate.cu.
WIDTH = 128
_ROWS = 16

# Thread blocks; with more rows than these have, each takes several. More than a GPU holds at once.
_MOST_BLOCKS = 1024


class _Compensate(ctypes.Structure):
    _fields_ = [
        ("weight", c_void_p),
        ("factor", c_void_p),
        ("mask", c_void_p),
        ("errors", c_void_p),
        ("dead", c_void_p),
        ("weight_stride", c_int64),
        ("mask_stride", c_int64),
        ("rows", c_int32),
        ("width", c_int32),
        ("n", c_int32),
        ("m", c_int32),
    ]


def serves(block: Tensor) -> bool:
    """Whether the kernel takes a block of columns as wide as this, on this device."""
    return block.shape[1] <= WIDTH and usable(block.device)


def block_errors(
    block: Tensor, mask: Tensor, factor: Tensor, n: int = 0, m: int = 0, dead: Tensor | None = None
) -> Tensor:
    """`besa.pruning.compensate.block_errors_reference`, for rows that are contiguous."""
    assert block.dtype == factor.dtype == torch.float32
    assert block.stride(1) == mask.stride(1) == 1
    rows, width = block.shape
    assert m == 0 or (dead is not None and width % m == 0)
    factor = factor.contiguous()  # the Cholesky factors of torch lie column by column
    dead = None if dead is None else dead.contiguous()
    errors = torch.empty(rows, width, device=block.device)
    if errors.numel() == 0:
        return errors
    arguments = _Compensate(
        block.data_ptr(),
        factor.data_ptr(),
        mask.data_ptr(),
        errors.data_ptr(),
        driver.at(dead),
        block.stride(0),
        mask.stride(0),
        rows,
        width,
        n,
        m,
    )
    shared = 4 * WIDTH * (WIDTH + (_ROWS if m else 0))
    grid = (min(-(-rows // _ROWS), _MOST_BLOCKS), 1, 1)
    kernel = driver.kernel("compensate.cu", "compensate", block.device)
    kernel.launch(grid, 32 * _ROWS, shared, arguments, driver.stream(block.device))
    return errors
