"""What a contender's checkpoint is: the bytes of its weights, and how they are packed."""

from __future__ import annotations

from pathlib import Path

from besa.bench.results import Packing
from besa.model.export_record import OnnxRecord
from besa.model.files import is_onnx
from besa.model.record import read_record
from besa.serve.launch import packing_of

_WEIGHTS = (("*.safetensors",), ("*.onnx", "*.onnx.data", "*.onnx_data"))


def weight_bytes(directory: Path) -> int | None:
    """Bytes of a checkpoint's weights; None where there are none."""
    for patterns in _WEIGHTS:
        if found := sum(p.stat().st_size for each in patterns for p in directory.glob(each)):
            return found
    return None


def packing(directory: Path) -> Packing | None:
    """How a model is packed, whichever engine it is for; None if it is not.

    Raises:
        BesaError: in a version of the format that this besa does not know.
    """
    if not is_onnx(directory):
        config = packing_of(directory)
        return None if config is None else Packing(config.values, config.pattern)
    record = read_record(directory)
    if not isinstance(record, OnnxRecord) or not record.sparse:
        return None
    return Packing(record.precision, str(record.pattern))
