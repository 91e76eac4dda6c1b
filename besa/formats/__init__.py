"""How weights are held once their zeros are worth something."""

from besa.formats.packed import FormatError, Packed, pack, quantize_int8

__all__ = ["FormatError", "Packed", "pack", "quantize_int8"]
