"""The settings of an export, and what it gives back.

config = ExportConfig(out="sparse", quantize="int8", group_size=128)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from besa.errors import BesaError

FORMATS = ("vllm", "dense")
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The settings of an export, checked when they are made.

    Attributes:
        out: the output directory; it must not exist, be empty, or be overwritten.
        format: "vllm" packs a pruned checkpoint, for vLLM and transformers; "dense" goes back.
        quantize: "int8" to round the weights that are kept, or None.
        group_size: for int8, how many columns share a scale; None if the whole row does.
        overwrite: replace what is at `out`.

    Raises:
        BesaError: a setting that cannot be, by name.
    """

    out: str | Path
    format: str = "vllm"
    quantize: str | None = None
    group_size: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise BesaError(f"format {self.format!r}: choose one of {', '.join(FORMATS)}")
        if self.quantize not in (None, "int8"):
            raise BesaError(f"quantize {self.quantize!r}: only int8 is there")
        if self.format == "dense" and self.quantize:
            raise BesaError("--quantize is for packing: leave it out with --format dense")
        if self.group_size is not None and not self.quantize:
            raise BesaError("--group-size is for --quantize int8: give both, or neither")
        if self.group_size not in (None, *GROUP_SIZES):
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise BesaError(f"group_size {self.group_size}: choose one of {sizes}, or leave it out")


@dataclass(frozen=True)
class ExportResult:
    """A finished export: where it is, and what besa.json there says."""

    out: Path
    record: dict[str, Any]
