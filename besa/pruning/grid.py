"""The few values that weights may have: `--quantize int8` or `int4`, with `:GROUP` columns a scale.

>>> Grid.parse("int4:64")
Grid(bits=4, group_size=64)
>>> Grid.parse("int4:64").levels, str(Grid.parse("int8"))
(7, 'int8')
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from besa.errors import BesaError
from besa.kernels.abi import GROUP_SIZES
from besa.settings import either

BITS = (8, 4)


@dataclass(frozen=True)
class Grid:
    """Whole numbers times a scale, the same on both sides of zero.

    Attributes:
        bits: of a whole number.
        group_size: how many columns share a scale, one of `GROUP_SIZES`; None: a whole row.
    """

    bits: int
    group_size: int | None = None

    @classmethod
    def parse(cls, text: str) -> Grid:
        """From "int8", "int4" or "int4:64".

        Raises:
            BesaError: it is none of these.
        """
        match = re.fullmatch(r"int(\d+)(?::(\d+))?", text)
        bits, group = (int(match[1]), match[2] and int(match[2])) if match else (0, None)
        if bits not in BITS or group not in (None, *GROUP_SIZES):
            sizes = either([*map(str, GROUP_SIZES)])
            raise BesaError(
                f"quantize {text!r}: give int8 or int4, and perhaps the columns that share a "
                f"scale, {sizes}: int4:64"
            )
        return cls(bits, group)

    def __str__(self) -> str:
        """The text that `parse` reads."""
        return f"int{self.bits}" + (f":{self.group_size}" if self.group_size else "")

    @property
    def levels(self) -> int:
        """The largest whole number."""
        return 2 ** (self.bits - 1) - 1
