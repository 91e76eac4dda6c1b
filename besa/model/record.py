"""besa.json: what `besa prune` and `besa export` leave beside the weights.

>>> record = read_record(Path("path/to/pruned"))
>>> if isinstance(record, PruneRecord):
...     print(record.sparsity.achieved, len(record.blocks))
0.5 3

Each kind of run has its type here, and a field is a key of the file. Only `read_record` and
`write_record` touch the file. This module loads in an instant, because it does without torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from besa.typed_json import ABSENT_IF_DEFAULT, ShapeError, from_json, to_json
from besa.writing import write_text

NAME = "besa.json"

# Of the records of exports. Those of pruning runs have theirs in the key "format".
RECORD_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Record:
    """What every run leaves.

    Attributes:
        besa_version: of the besa that ran.
        model: the directory or hub id that it was given.
        architecture: the name of the model's class.
        settings: all that the result depends on, as the run was given it.
        versions: of besa, Python and the libraries.
        seconds: from start to end; of a run that was resumed, of its last part.
        peak_memory_bytes: the most memory that the process had.
        digests: the SHA-256 of each file of weights.
    """

    besa_version: str = ""
    model: str
    architecture: str = ""
    settings: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    digests: dict[str, str] = field(default_factory=dict)


# ------------------------------------------------------------------------------ besa prune


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Zeros over all pruned linears; `target` and `achieved` are fractions of `weights`."""

    target: float | None = None
    achieved: float
    zeros: int = 0
    weights: int = 0


@dataclass(frozen=True, kw_only=True)
class RowRates:
    """How the rows of a linear share its zeros.

    Attributes:
        min, mean, max: of the rows' fractions of zeros.
        histogram: rows in each of equal bins over [0, 1].
    """

    min: float
    mean: float
    max: float
    histogram: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LinearRecord:
    """The zeros of one linear.

    Attributes:
        name: within the block.
        shape: [out, in], or [experts, out, in].
        zeros: how many weights are zero; `sparsity` is their fraction.
        rows: how the rows share them.
        unrouted_experts: experts that no calibration token reached.
    """

    name: str
    shape: tuple[int, ...]
    zeros: int = 0
    sparsity: float
    rows: RowRates | None = None
    unrouted_experts: tuple[int, ...] = field(default=(), metadata=ABSENT_IF_DEFAULT)


@dataclass(frozen=True, kw_only=True)
class BlockRecord:
    """One pruned block.

    Attributes:
        index, name: its place among the blocks, and its name in the model.
        weights, zeros, sparsity: of its pruned linears together.
        error: ‖dense − pruned‖² / ‖dense‖² of its output.
        error_wanda: the same with Wanda's mask at the same rate; None if that is the method's own.
        loss: the mean loss of each epoch, of a method that learns.
        seconds: what the block took.
    """

    index: int
    name: str = ""
    weights: int = 0
    zeros: int = 0
    sparsity: float
    linears: tuple[LinearRecord, ...]
    error: float | None = None
    error_wanda: float | None = None
    loss: tuple[float | None, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class PruneRecord(Record):
    """What `besa prune` leaves.

    Attributes:
        format: the version of this record.
        device, dtype, threads: where and how it was computed.
        sparsity: what was asked for and achieved.
        blocks: in the model's order.
        peak_device_memory_bytes: the most memory that was in use on a GPU; None on a CPU.
        notes: what the user should know of the run, a sentence each.
    """

    format: int = 1
    device: str = ""
    dtype: str = ""
    threads: int | None = None
    sparsity: Sparsity
    blocks: tuple[BlockRecord, ...] = ()
    peak_device_memory_bytes: int | None = None
    notes: tuple[str, ...] = ()


# ----------------------------------------------------------------------------- besa export


@dataclass(frozen=True, kw_only=True)
class ExportRecord(Record):
    """What every export leaves.

    Attributes:
        format: what `--format` was: "vllm", "dense" or "onnx".
        source: the besa.json of what was exported, word for word: another program's, maybe.
    """

    command: str = "export"
    record_version: int = RECORD_VERSION
    format: str
    source: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class PackedSizes:
    """Bytes of all weight files, and of the packed linears alone, before and after."""

    dense_bytes: int
    bytes: int
    linears_dense_bytes: int
    linears_bytes: int


@dataclass(frozen=True, kw_only=True)
class ReadPerToken:
    """Bytes of weights that one token reads, dense and packed, and the first over the second."""

    dense_bytes: int
    packed_bytes: int
    speedup: float


@dataclass(frozen=True, kw_only=True)
class PackedLinearRecord:
    """A linear that is stored without its zeros.

    Attributes:
        name: as the files spell it, without ".weight".
        kind: its name within a block, the last part if that is enough ("up_proj").
        block: the block's index.
        shape: [out, in].
        nonzeros: the values that are stored; `density` is their share.
        dense_bytes, bytes: what it took, and what it takes.
    """

    name: str
    kind: str
    block: int
    shape: tuple[int, ...]
    nonzeros: int
    density: float
    dense_bytes: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class DenseLinear:
    """A linear of a block that stays dense, and why; `density` where it was counted."""

    name: str
    kind: str
    bytes: int
    reason: str
    density: float | None = None


@dataclass(frozen=True, kw_only=True)
class PackedRecord(ExportRecord):
    """What `besa export --format vllm` leaves.

    Attributes:
        format_version: of the packed format (besa.formats.checkpoint).
        values: what the values are stored as; `group_size` columns share a scale, or a whole row.
        pattern: of the zeros, "unstructured" or "N:M".
        dense: the linears that are stored as they were.
    """

    format_version: int
    values: str
    group_size: int | None = None
    pattern: str
    sizes: PackedSizes
    read_per_token: ReadPerToken
    linears: tuple[PackedLinearRecord, ...]
    dense: tuple[DenseLinear, ...] = ()


@dataclass(frozen=True, kw_only=True)
class UnpackedSizes:
    """Bytes of all weight files, before and after."""

    packed_bytes: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class UnpackedRecord(ExportRecord):
    """What `besa export --format dense` leaves; `unpacked` is how many linears were packed."""

    sizes: UnpackedSizes
    unpacked: int


@dataclass(frozen=True, kw_only=True)
class PackedProduct:
    """A product of an ONNX graph that is on packed weights.

    Attributes:
        name: of its node.
        shape: [out, in].
        nonzeros: the values that are stored; `density` is their share.
        bytes: what they take, with the bitmask.
        sparse: whether it was pruned; if not, it is packed for its smaller type.
    """

    name: str
    shape: tuple[int, ...]
    nonzeros: int
    density: float
    bytes: int
    sparse: bool


@dataclass(frozen=True, kw_only=True)
class LogitsCheck:
    """How far a graph's logits are from transformers'.

    Attributes:
        error: the norm of the difference over the norm of transformers' logits.
        agreement: the share of tokens whose likeliest successor is the same.
        tokens: how many were compared.
        dtype: in which transformers computed.
    """

    error: float
    agreement: float
    tokens: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class OnnxRecord(ExportRecord):
    """What `besa export --format onnx` leaves.

    Attributes:
        graph: "genai" or "standard", which is what was made, not what was asked for.
        sparse: whether its weights are packed; `packed` are those products.
        precision, group_size: of the weights.
        pattern: of the zeros; None where nobody knows.
        bytes, source_bytes: of the weights, in the graph and in the checkpoint.
        check: None where this CPU cannot run the graph.
    """

    graph: str
    sparse: bool
    precision: str
    group_size: int | None = None
    pattern: str | None = None
    packed: tuple[PackedProduct, ...] = ()
    bytes: int
    source_bytes: int
    check: LogitsCheck | None = None


# ---------------------------------------------------------------------------- read and write

_EXPORTS: dict[str, type[ExportRecord]] = {
    "vllm": PackedRecord,
    "dense": UnpackedRecord,
    "onnx": OnnxRecord,
}


def read_record(directory: Path) -> Record | None:
    """The record of a directory; None if it has none, or one that besa did not write."""
    found = read_raw_record(directory)
    return None if found is None else parse_record(found)


def read_raw_record(directory: Path) -> dict[str, Any] | None:
    """The JSON of a directory's besa.json as it is; None if it cannot be read."""
    try:
        found = json.loads((directory / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def parse_record(found: Mapping[str, Any]) -> Record | None:
    """The record that a JSON object holds; None if it is no record of besa's."""
    kind: type[Record] | None = PruneRecord
    if found.get("command") == "export":
        kind = _EXPORTS.get(str(found.get("format")))
    try:
        return None if kind is None else from_json(kind, found, lenient=True)
    except ShapeError:
        return None


def write_record(record: Record, directory: Path) -> None:
    """Writes besa.json, whole or not at all.

    Raises:
        BesaError: it could not be written.
    """
    write_text(json.dumps(to_json(record), indent=1), directory / NAME)


def pruning_of(record: ExportRecord) -> PruneRecord | None:
    """The record of `besa prune` that an export goes back to, if besa pruned the model.

    A model may have been packed and unpacked in between.
    """
    source = record.source
    while isinstance(source, dict):
        found = parse_record(source)
        if isinstance(found, PruneRecord):
            return found
        source = source.get("source")
    return None
