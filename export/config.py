"""The settings of an export, and what it gives back.

>>> ExportConfig(out="sparse", quantize="int8", group_size=128).format
'vllm'
>>> ExportConfig(out="sparse", group_size=128)
Traceback (most recent call last):
besa.errors.BesaError: --group-size is for --quantize int8 or int4: give both, or neither
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from besa.errors import BesaError
from besa.kernels.abi import GROUP_SIZES, WHOLE
from besa.model.export_record import ExportRecord
from besa.settings import check_choices, described, either, setting, trust_remote_code_setting

FORMATS = ("vllm", "dense", "onnx")
GRAPHS = ("genai", "standard")
DENSE_PRECISIONS = ("fp32", "fp16", "int8", "int4")
SPARSE_PRECISIONS = ("bf16", "fp16", "fp32", "int8", "int4")
# Columns that share a step of int4 values, unless it is said.
INT4_GROUP = 64
# Of graphs for NVIDIA GPUs, the default first.
CUDA_PRECISIONS = ("fp16", "int4")
CUDA_SPARSE_PRECISIONS = ("fp16", "bf16", "int8")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The settings of an export, checked when they are made.

    Raises:
        BesaError: a setting that cannot be, by name.
    """

    out: str | Path = field(metadata=described("output directory", metavar="DIR"))
    format: str = setting(
        "vllm",
        "vllm packs, dense unpacks what was packed, onnx makes a graph (default: %(default)s)",
        choices=FORMATS,
    )
    quantize: str | None = setting(
        None,
        "int8, int4: round what is kept to 8 or 4 bits; none: do not (default: as it was pruned)",
        metavar="TYPE",
    )
    group_size: int | None = setting(
        None,
        f"for int8, int4: {either([*map(str, GROUP_SIZES)])} columns share a scale (default: a "
        "whole row for int8, 64 for int4)",
        metavar="N",
    )
    weight_only: bool = setting(
        False,
        "for int8, int4: products take activations as they are (default: quantized to 8 bits, too, "
        "by token)",
    )
    device: str = setting(
        "cpu",
        "onnx: what computes the graph, %(choices)s (default: %(default)s)",
        choices=("cpu", "cuda"),
    )
    sparse: bool = setting(False, "onnx: packed weights, by besa's operator (default: dense ones)")
    precision: str | None = setting(
        None,
        "onnx: fp32 (the default), fp16 (for GPUs), int8 or int4; with --sparse "
        f"{either(SPARSE_PRECISIONS)} (default: as stored); with --device cuda fp16 (the default) "
        "or int4, with both fp16 (the default), bf16 or int8",
    )
    onnx_graph: str = setting(
        "genai",
        "onnx: genai for fused operators, standard for those of ONNX alone (default: %(default)s)",
        metavar="KIND",
        choices=GRAPHS,
    )
    trust_remote_code: bool = trust_remote_code_setting()
    overwrite: bool = setting(False, "replace what is at --out")

    def __post_init__(self) -> None:
        check_choices(self)
        if self.quantize not in (None, "none", *WHOLE):
            raise BesaError(f"quantize {self.quantize!r}: choose int8, int4 or none")
        if self.weight_only and (self.format != "vllm" or self.quantize == "none"):
            raise BesaError("--weight-only is for int8 or int4 values of --format vllm")
        if self.format == "dense" and self.quantize:
            raise BesaError("--quantize is for packing: leave it out with --format dense")
        if self.format == "onnx":
            self._check_onnx()
        elif self.sparse or self.precision or self.onnx_graph != "genai" or self.device != "cpu":
            raise BesaError(
                "--sparse, --precision, --onnx-graph and --device are for --format onnx"
            )
        elif self.group_size is not None and self.quantize not in WHOLE:
            raise BesaError("--group-size is for --quantize int8 or int4: give both, or neither")
        if self.group_size is None and "int4" in (self.quantize, self.sparse and self.precision):
            object.__setattr__(self, "group_size", INT4_GROUP)
        if self.group_size not in (None, *GROUP_SIZES):
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise BesaError(f"group_size {self.group_size}: choose one of {sizes}, or leave it out")

    def _check_onnx(self) -> None:
        if self.quantize:
            raise BesaError(f"--format onnx takes --precision {self.quantize}, not --quantize")
        known: tuple[str, ...] = SPARSE_PRECISIONS if self.sparse else DENSE_PRECISIONS
        kind = "sparse" if self.sparse else "dense"
        if self.device == "cuda":
            known = CUDA_SPARSE_PRECISIONS if self.sparse else CUDA_PRECISIONS
            kind += " CUDA"
            if self.onnx_graph != "genai":
                raise BesaError("--device cuda takes --onnx-graph genai")
        if self.precision not in (None, *known):
            raise BesaError(
                f"precision {self.precision!r}: a {kind} graph has one of {', '.join(known)}"
            )
        if self.group_size is not None and not (self.sparse and self.precision in WHOLE):
            raise BesaError("--group-size is for --sparse --precision int8 or int4")
        dense = None if self.sparse else self.precision
        if self.onnx_graph == "standard" and dense not in (None, "fp32"):
            raise BesaError(f"--onnx-graph standard is fp32 or --sparse, not {dense}")


@dataclass(frozen=True)
class ExportResult:
    """A finished export: where it is, and what besa.json there says.

    `record` is a `PackedRecord`, an `UnpackedRecord` or an `OnnxRecord`, by the format.
    """

    out: Path
    record: ExportRecord
