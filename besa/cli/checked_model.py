"""What `besa doctor MODEL` says of a model: that its files are whole.

>>> print(check_model("path/to/sparse"))
path/to/sparse is whole: ... files of weights, ..., 21 packed weights that fit their bitmasks
... files are, to the last bit, what besa wrote
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from besa.export.packed.unpack import PackedCheckpoint
from besa.model.checkpoint import Checkpoint
from besa.model.digests import check_digests
from besa.model.files import is_onnx, model_directory
from besa.model.record import read_record
from besa.report.formatting import size
from besa.serve.launch import packing_of


@dataclass(frozen=True)
class CheckedModel:
    """A model that is whole.

    Attributes:
        model: its directory.
        files: how many files of weights it has, and `bytes` their sizes.
        packed: how many packed weights were read and fit.
        verified: how many files are what besa.json says; None where besa did not write them.
    """

    model: str
    files: int
    bytes: int
    packed: int
    verified: int | None

    def __str__(self) -> str:
        """For people."""
        number = f"{self.files} file{'s' if self.files != 1 else ''} of weights"
        packed = f", {self.packed} packed weights that fit their bitmasks" if self.packed else ""
        digests = "besa did not write it, so that there are no digests to compare with"
        if self.verified is not None:
            digests = f"{self.verified} files are, to the last bit, what besa wrote"
        return f"{self.model} is whole: {number}, {size(self.bytes)}{packed}\n{digests}"


def _check_graph(directory: Path) -> set[Path]:
    """The files of an ONNX model's weights, which are there to their last byte."""
    from besa.export.onnx.check import load_whole
    from besa.export.onnx.runtime import runtime
    from besa.serve.onnx.description import described_by

    runtime()  # or says what is not installed
    graph = directory / described_by(directory)["model"]["decoder"]["filename"]
    load_whole(graph)
    data = graph.with_name(graph.name + ".data")
    return {graph, data} if data.is_file() else {graph}


def check_model(model: str) -> CheckedModel:
    """Reads all of a model's files.

    Raises:
        BesaError: what is wrong with one of them.
    """
    directory = model_directory(model)
    packed = 0
    if is_onnx(directory):
        weights = _check_graph(directory)
    elif packing_of(directory) is not None:
        checkpoint = PackedCheckpoint.open(directory)
        checkpoint.check()
        weights, packed = set(checkpoint.files.values()), len(checkpoint.weights)
    else:
        weights = set(Checkpoint.open(directory).files.values())
    written = read_record(directory)
    verified = check_digests(directory) if written is not None and written.digests else None
    total = sum(path.stat().st_size for path in weights)
    return CheckedModel(model, len(weights), total, packed, verified)
