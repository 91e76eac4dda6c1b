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

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from besa.formats.config import QUANT_METHOD, PackedConfig

if TYPE_CHECKING:
    from besa.formats.checkpoint import packed_of, packed_weights, tensors_of
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


def __getattr__(name: str) -> Any:
    """What needs torch, once asked for: `besa serve` reads `PackedConfig`, and leaves torch be."""
    if name in __all__:
        for module in ("packed", "int4", "checkpoint"):
            found = import_module(f"besa.formats.{module}")
            if hasattr(found, name):
                return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
