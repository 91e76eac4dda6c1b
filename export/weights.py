"""One weight: its zeros, the pattern that they keep to, and the weight without them.

>>> import torch
>>> weight = torch.tensor([[1.0, 0, 2, 0, 0, 3, 0, 4]])
>>> nonzeros_and_patterns(weight)
(4, ('2:4', '4:8'))
>>> pack_weight(weight, "bfloat16").values
tensor([1., 2., 3., 4.], dtype=torch.bfloat16)
"""

from __future__ import annotations

import torch
from torch import Tensor

from besa.formats import Packed, pack, quantize_int4, quantize_int8
from besa.kernels.abi import WHOLE
from besa.kernels.packing import bits_of_fours, pack_mask

# Packed bytes over dense bytes from which on a linear stays dense (0.84 of bfloat16 weights kept).
# Below, the product's time follows the bytes: 0.82 of the time for 0.81 of them at batch 1.
WORTH = 0.9

# The N:M patterns that hardware and kernels know, the stricter one first.
PATTERNS = ("2:4", "4:8")


def nonzeros_and_patterns(matrix: Tensor) -> tuple[int, tuple[str, ...]]:
    """How many weights of a matrix [out, in] are not zero, and which `PATTERNS` its rows keep."""
    bits, row_ptr = pack_mask(matrix)
    low, high = bits_of_fours(bits)
    fits = {
        "2:4": bool((low <= 2).all() and (high <= 2).all()),
        "4:8": bool((low + high <= 4).all()),
    }
    return int(row_ptr[-1]), tuple(pattern for pattern in PATTERNS if fits[pattern])


def pack_weight(
    weight: Tensor, values: str, group_size: int | None = None, peak: int = 127
) -> Packed:
    """A weight [out, in] without its zeros.

    Args:
        values: the type to store what is left as, "bfloat16", "int8" or "int4"; the last two round.
        group_size: for these, how many columns share a scale; None if the whole row does.
        peak: for int8, what the largest weight of a group becomes.
    """
    if values in WHOLE:
        whole, scale, steps = quantize(weight, values, group_size, peak)
        return pack(whole, scale, group_size, steps)
    dtype: torch.dtype = getattr(torch, values)
    return pack(weight.to(dtype))


def quantize(
    weight: Tensor, values: str, group_size: int | None, peak: int = 127
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A weight [out, in] as whole numbers, int8 [out, in], their scale, and for int4 their steps.

    Args:
        values: "int8" or "int4".
    """
    if values == "int4":
        return quantize_int4(weight, group_size)
    return *quantize_int8(weight, group_size, peak), None
