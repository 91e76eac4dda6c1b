"""What `besa export` would take: the files, memory, and the time that their bytes take.

>>> plan = plan_export("path/to/pruned", ExportConfig(out="sparse"), timed=False)
>>> plan.missing, plan.output < plan.files["the model now"]
({}, True)

How many weights are zero is in the besa.json of a model that besa pruned. Of others it is known
only once the weights are read, and half of them are taken to be zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from besa.errors import BesaError
from besa.export.config import ExportConfig
from besa.export.packable import short
from besa.export.rounded import as_pruned
from besa.export.source import check_plain
from besa.export.weights import WORTH
from besa.model.files import resolve
from besa.model.prune_record import PruneRecord
from besa.model.record import read_record
from besa.planning.parts import Moment, peak_of
from besa.planning.room import Room, room_for
from besa.planning.shapes import LinearShape, ModelShape, open_headers, quantized_as, shape_of
from besa.planning.speed import measure

_UNKNOWN = 0.5  # the share of zeros where nothing says it

# Bytes of a weight in a graph's file of data, with what belongs to it.
_GRAPH_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.1, "int4": 0.65}

# Bytes that packing reads and writes for each weight: counted, packed, unpacked and compared.
_PACKING = 40


@dataclass(frozen=True)
class ExportPlan:
    """What an export would take.

    Attributes:
        name: of the model.
        parameters, blocks: how many it has.
        what: the format in words.
        files: bytes by what they hold, the model as it is first.
        output: bytes that the disk has to have.
        memory: the moment at which most of it is taken.
        room: what there is.
        read_speed: bytes a second that are read and digested here; None where not measured.
        seconds: estimated, by bytes; None without a speed.
        notes: what the figures rest on.
    """

    name: str
    parameters: int
    blocks: int
    what: str
    files: Mapping[str, int]
    output: int
    memory: Moment
    room: Room
    read_speed: float | None
    seconds: float | None
    notes: tuple[str, ...]

    @property
    def missing(self) -> dict[str, int]:
        """Bytes that are missing, of what there is too little."""
        return self.room.lacking({"memory": self.memory.total, "disk": self.output})


def packed_bytes(
    linear: LinearShape,
    nonzeros: float,
    itemsize: int,
    quantize: str | None = None,
    group_size: int | None = None,
) -> int:
    """Bytes of a packed linear.

    The values, `itemsize` each, or one for int8 and a half for int4; a bit for each weight, whole
    bytes for each row; 4 bytes a row for where it begins; and scales: 4 bytes for each group of
    int8, 4 for each row and one for each group of int4.
    """
    rows, groups = linear.groups * linear.rows, -(-linear.cols // (group_size or linear.cols))
    value = {None: float(itemsize), "int8": 1.0, "int4": 0.5}[quantize]
    scales = {None: 0, "int8": 4 * groups, "int4": 4 + groups}[quantize]
    return int(nonzeros * value) + rows * (-(-linear.cols // 8) + 4 + scales)


def plan_export(model: str | Path, config: ExportConfig, *, timed: bool = True) -> ExportPlan:
    """Plans an export by config.json, headers and besa.json; writes nothing.

    Args:
        timed: whether to measure this machine, which takes two seconds.

    Raises:
        BesaError: no such model, or one that is packed already and not to be unpacked.
    """
    room = room_for(torch.device("cpu"), Path(config.out))
    unpacks = config.format == "dense"
    if not unpacks:
        check_plain(resolve(model))
    elif quantized_as(model) is None:
        raise BesaError(f"{model} is not packed: leave --format dense out")
    config = config if unpacks else as_pruned(model, config)
    shape = shape_of(open_headers(model, config.trust_remote_code, packed=unpacks))
    zeros, notes = _zeros(model, shape)
    base = {"Python, torch, transformers": room.process}
    if config.format == "dense":
        files, moments = _unpacking(shape, model)
        what, output = "unpacked", files["the dense model"]
    elif config.format == "onnx":
        files, moments = _graph(shape, zeros, config)
        what = f"an ONNX graph, {_precision(config, shape)}{', packed' if config.sparse else ''}"
        # The graph of floats is there first.
        output = int(max(files["the graph's data"], shape.parameters * _GRAPH_BYTES["fp32"]))
        notes.append("memory of ONNX graphs is a rough estimate: the exporters are not besa's")
    else:
        files, moments = _packing(shape, zeros, config)
        what, output = f"packed as {config.quantize or short(shape.dtype)}", files["the output"]
    speed = seconds = None
    if timed:
        speed = measure(torch.device("cpu"), torch.float32, 64, 256, shape.weights)
        # Read twice; written, read back and digested.
        through = 2 * shape.stored_bytes + 3 * output
        seconds = through / speed.read + _PACKING * shape.parameters / speed.moved
    return ExportPlan(
        name=shape.name,
        parameters=shape.parameters,
        blocks=len(shape.blocks),
        what=what,
        files=files,
        output=output,
        memory=peak_of([moment.beside(base) for moment in moments]),
        room=room,
        read_speed=speed.read if speed else None,
        seconds=seconds,
        notes=tuple(notes),
    )


def _zeros(model: str | Path, shape: ModelShape) -> tuple[list[dict[str, float]], list[str]]:
    """The share of zeros of each block's linears by name, and what to say of it."""
    record = read_record(resolve(model))
    if isinstance(record, PruneRecord):
        return [{x.name: x.sparsity for x in block.linears} for block in record.blocks], []
    note = "half of the weights are taken to be zero: besa.json does not say how many are"
    unknown = [{x.name: _UNKNOWN for x in block.linears} for block in shape.blocks]
    return unknown, [note]


def _packed_blocks(
    shape: ModelShape, zeros: list[dict[str, float]], quantize: str | None, group: int | None
) -> Iterator[tuple[int, int]]:
    """Bytes of each block's linears, packed where that is worth it; and of its packed ones."""
    for block, shares in zip(shape.blocks, zeros, strict=False):
        whole = packed = 0
        for x in block.linears:
            kept = (1 - shares.get(x.name, 0.0)) * x.size
            dense = x.size * shape.itemsize
            size = packed_bytes(x, kept, shape.itemsize, quantize, group)
            worth = size < WORTH * dense
            whole += size if worth else dense
            packed += size if worth else 0
        yield whole, packed


def _packing(
    shape: ModelShape, zeros: list[dict[str, float]], config: ExportConfig
) -> tuple[dict[str, int], list[Moment]]:
    """Files, and moments: the block as stored, packed, and a matrix that is counted or compared."""
    blocks = list(_packed_blocks(shape, zeros, config.quantize, config.group_size))
    linears = sum(x.size for block in shape.blocks for x in block.linears)
    rest = (shape.parameters - linears) * shape.itemsize
    packed = sum(size for _, size in blocks)
    files = {
        "the model now": shape.stored_bytes,
        "packed linears": packed,
        "all else": sum(whole for whole, _ in blocks) - packed + rest,
    }
    files["the output"] = files["packed linears"] + files["all else"]
    largest = max((x.groups * x.rows * x.cols for b in shape.blocks for x in b.linears), default=0)
    most = max((block.parameters for block in shape.blocks), default=0) * shape.itemsize
    moments = [
        Moment("copy", {"embedding, norms, head": shape.others * shape.itemsize}),
        Moment(
            "pack",
            {
                "block as stored": most,
                "block packed": max((size for _, size in blocks), default=0),
                "the largest matrix": largest * (shape.itemsize + 4),
            },
        ),
    ]
    return files, moments


def _unpacking(shape: ModelShape, model: str | Path) -> tuple[dict[str, int], list[Moment]]:
    """Files, and moments: a block packed and unpacked."""
    dense = shape.parameters * shape.itemsize
    now = sum(path.stat().st_size for path in resolve(model).glob("*.safetensors"))
    most = max(block.parameters for block in shape.blocks) * shape.itemsize
    moments = [
        Moment("copy", {"embedding, norms, head": shape.others * shape.itemsize}),
        Moment("unpack", {"block packed": int(most * now / dense), "block unpacked": most}),
    ]
    return {"the model now": now, "the dense model": dense}, moments


def _graph(
    shape: ModelShape, zeros: list[dict[str, float]], config: ExportConfig
) -> tuple[dict[str, int], list[Moment]]:
    """Files, and moments: the model that the graph is compared with, and the graph of floats."""
    precision = _precision(config, shape)
    data = int(shape.parameters * _GRAPH_BYTES[precision])
    if config.sparse:
        quantize = precision if precision in ("int8", "int4") else None
        blocks = _packed_blocks(shape, zeros, quantize, config.group_size)
        data = sum(whole for whole, _ in blocks) + int(shape.others * _GRAPH_BYTES[precision])
    floats = int(4 * shape.parameters)
    files = {"the model now": shape.stored_bytes, "the graph's data": data}
    parts = {"the model": shape.stored_bytes, "the graph in float32": floats, "its data": floats}
    return files, [Moment("build the graph", parts)]


def _precision(config: ExportConfig, shape: ModelShape) -> str:
    """What a graph's weights are, as `besa.export.onnx.model` decides it."""
    if config.precision:
        return config.precision
    if config.device == "cuda":
        return "fp16"
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    return names[shape.dtype] if config.sparse else "fp32"
