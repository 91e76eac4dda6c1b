"""What `besa export` leaves in besa.json: sizes, what is packed, and what it was made of.

>>> from pathlib import Path
>>> from besa.model.record import read_record
>>> record = read_record(Path("path/to/sparse"))
>>> record.values, len(record.linears), record.linears[0].density
('float32', 21, 0.5)

A field is a key of the file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from besa.model.prune_record import Record
from besa.typed_json import ABSENT_IF_DEFAULT

# Of the records of exports. Those of pruning runs have theirs in the key "format".
RECORD_VERSION = 1


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
        shape: [out, in]; of a stack of experts [experts * out, in].
        nonzeros: the values that are stored; `density` is their share.
        dense_bytes, bytes: what it took, and what it takes.
        expert: whether it is an expert of a mixture, or all of a layer's in a stack: a token reads
            it if it is sent there.
    """

    name: str
    kind: str
    block: int
    shape: tuple[int, ...]
    nonzeros: int
    density: float
    dense_bytes: int
    bytes: int
    expert: bool = field(default=False, metadata=ABSENT_IF_DEFAULT)


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
        format_version: of the packed format (besa.formats.config).
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
        device: "cpu" or "cuda", what it is for.
        sparse: whether its weights are packed; `packed` are those products.
        precision, group_size: of the weights.
        pattern: of the zeros; None where nobody knows.
        bytes, source_bytes: of the weights, in the graph and in the checkpoint.
        check: None where this CPU cannot run the graph.
    """

    graph: str
    device: str = "cpu"
    sparse: bool
    precision: str
    group_size: int | None = None
    pattern: str | None = None
    packed: tuple[PackedProduct, ...] = ()
    bytes: int
    source_bytes: int
    check: LogitsCheck | None = None
