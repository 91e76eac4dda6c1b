"""How weights are held once their zeros are worth something.

>>> import torch
>>> from besa.formats import pack
>>> weight = torch.eye(64, dtype=torch.bfloat16)
>>> packed = pack(weight)
>>> packed.nbytes, weight.nbytes
(640, 8192)
>>> torch.equal(packed.unpack(), weight)
True
"""

from besa.formats.checkpoint import (
    QUANT_METHOD,
    PackedConfig,
    packed_of,
    packed_weights,
    tensors_of,
)
from besa.formats.int4 import quantize_int4
from besa.formats.packed import FormatError, Packed, pack, quantize_int8

__all__ = [
    "QUANT_METHOD",
    "FormatError",
    "Packed",
    "PackedConfig",
    "pack",
    "packed_of",
    "packed_weights",
    "quantize_int4",
    "quantize_int8",
    "tensors_of",
]
