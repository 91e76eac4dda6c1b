"""Packs a pruned checkpoint for serving, and unpacks it again: `besa export`.

>>> from besa.export import ExportConfig, export
>>> result = export("path/to/pruned", ExportConfig(out="sparse"))
>>> print(result.record.sizes)
PackedSizes(...)
>>> export("sparse", ExportConfig(out="dense", format="dense")).out
PosixPath('dense')
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from besa.export.config import ExportConfig, ExportResult

if TYPE_CHECKING:
    from besa.progress import Tell

__all__ = ["ExportConfig", "ExportResult", "export", "ort_library"]


def ort_library() -> str:
    """The path of the library of `ai.besa::SparseMatMul`, for ONNX Runtime's sessions to register.

    Raises:
        BesaError: this installation was built without it.
    """
    from besa.export.onnx import runtime as ort

    return ort.ort_library()


def export(
    source: str | Path,
    config: ExportConfig,
    tell: Tell = lambda event: None,
) -> ExportResult:
    """Writes `source` to `config.out` in `config.format`.

    Args:
        source: a pruned Hugging Face directory or hub id; for "dense", what an export packed.
        tell: is given an `Event` for every step, for display.

    Raises:
        BesaError: something that the user can mend; what was finished stays in `OUT.partial`
            and the same call goes on from there.
    """
    # torch takes seconds to import; `besa --help` should not.
    if config.format == "dense":
        from besa.export.packed.unpack import unpack_checkpoint

        return unpack_checkpoint(source, config, tell)
    if config.format == "onnx":
        from besa.export.onnx import runtime as ort

        ort.runtime()  # or a word on what is missing, before its packages are imported

    from besa.export.rounded import as_pruned

    config = as_pruned(source, config)
    if config.format == "onnx":
        from besa.export.onnx.model import export_onnx

        return export_onnx(source, config, tell)
    from besa.export.packed.pack import pack_checkpoint

    return pack_checkpoint(source, config, tell)
