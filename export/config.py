"""The settings of an export, and what it gives back.

config = ExportConfig(out="sparse", quantize="int8", group_size=128)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from besa.errors import BesaError

FORMATS = ("vllm", "dense", "onnx")
GRAPHS = ("genai", "standard")
GROUP_SIZES = (32, 64, 128)
DENSE_PRECISIONS = ("fp32", "fp16", "int8", "int4")
SPARSE_PRECISIONS = ("bf16", "fp16", "fp32", "int8")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The settings of an export, checked when they are made.

    Attributes:
        out: the output directory; it must not exist, be empty, or be overwritten.
        format: "vllm" packs a pruned checkpoint, for vLLM and transformers; "dense" goes back;
            "onnx" makes a graph for ONNX Runtime.
        quantize: "int8" to round the weights that are kept, or None.
        group_size: for int8, how many columns share a scale; None if the whole row does.
        sparse: for onnx, packed weights and besa's operator instead of dense ones.
        precision: for onnx, one of `DENSE_PRECISIONS` or `SPARSE_PRECISIONS`; None for fp32, or
            where weights are packed for what the checkpoint is stored in.
        onnx_graph: "genai" for the fused operators of ONNX Runtime GenAI's model builder,
            "standard" for those of the ONNX standard alone.
        overwrite: replace what is at `out`.

    Raises:
        BesaError: a setting that cannot be, by name.
    """

    out: str | Path
    format: str = "vllm"
    quantize: str | None = None
    group_size: int | None = None
    sparse: bool = False
    precision: str | None = None
    onnx_graph: str = "genai"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise BesaError(f"format {self.format!r}: choose one of {', '.join(FORMATS)}")
        if self.quantize not in (None, "int8"):
            raise BesaError(f"quantize {self.quantize!r}: only int8 is there")
        if self.format == "dense" and self.quantize:
            raise BesaError("--quantize is for packing: leave it out with --format dense")
        if self.format == "onnx":
            self._check_onnx()
        elif self.sparse or self.precision or self.onnx_graph != "genai":
            raise BesaError("--sparse, --precision and --onnx-graph are for --format onnx")
        elif self.group_size is not None and not self.quantize:
            raise BesaError("--group-size is for --quantize int8: give both, or neither")
        if self.group_size not in (None, *GROUP_SIZES):
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise BesaError(f"group_size {self.group_size}: choose one of {sizes}, or leave it out")

    def _check_onnx(self) -> None:
        if self.quantize:
            raise BesaError(f"--format onnx takes --precision {self.quantize}, not --quantize")
        known = SPARSE_PRECISIONS if self.sparse else DENSE_PRECISIONS
        if self.precision not in (None, *known):
            kind = "sparse" if self.sparse else "dense"
            raise BesaError(
                f"precision {self.precision!r}: a {kind} graph has one of {', '.join(known)}"
            )
        if self.group_size is not None and not (self.sparse and self.precision == "int8"):
            raise BesaError("--group-size is for --sparse --precision int8")
        if self.onnx_graph not in GRAPHS:
            raise BesaError(f"onnx_graph {self.onnx_graph!r}: choose one of {', '.join(GRAPHS)}")
        dense = None if self.sparse else self.precision
        if self.onnx_graph == "standard" and dense not in (None, "fp32"):
            raise BesaError(f"--onnx-graph standard is fp32 or --sparse, not {dense}")


@dataclass(frozen=True)
class ExportResult:
    """A finished export: where it is, and what besa.json there says."""

    out: Path
    record: dict[str, Any]
