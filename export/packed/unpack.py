"""Unpacks a packed checkpoint, block by block: the plain Hugging Face directory that it was.

>>> config = ExportConfig(out="dense", format="dense")
>>> unpack_checkpoint("path/to/sparse", config, tell=lambda event: None).out
PosixPath('dense')

Names, shapes, layouts and floats come back as they were, bit for bit (-0.0 as +0.0). int8 and int4
values come back as value × scale, rounded once to the model's dtype.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from besa.errors import BesaError
from besa.export.config import ExportConfig, ExportResult
from besa.export.packed.bitmask import BitmaskCheckpoint
from besa.export.packed.dequantize import QuantizedCheckpoint
from besa.formats import FormatError, PackedConfig, packed_of
from besa.formats.checkpoint import SUFFIXES
from besa.machine import give_memory_back, peak_memory
from besa.model.architecture import read_config
from besa.model.checkpoint import Checkpoint
from besa.model.export_record import UnpackedRecord, UnpackedSizes
from besa.model.files import read_tensor, resolve, stored_bytes, stored_dtype, weight_files
from besa.model.quantization import dequantizing, not_floats, stored_as
from besa.model.record import read_raw_record, read_record, write_record
from besa.model.workspace import Workspace, check_free
from besa.progress import Event, Tell
from besa.version import __version__, versions
from besa.writing import sha256


@dataclass(frozen=True)
class PackedCheckpoint:
    """A packed model on disk.

    Attributes:
        directory: where it is.
        config: what its config.json says of the packing.
        files: the file of each stored tensor.
        weights: the names of the packed weights.
        skeleton: the model that they make, as if `weights` were stored dense.
        dtype: the model's own, which int8 values become.
    """

    directory: Path
    config: PackedConfig
    files: dict[str, Path]
    weights: frozenset[str]
    skeleton: Checkpoint
    dtype: torch.dtype

    @classmethod
    def open(cls, model: str | Path, trust_remote_code: bool = False) -> PackedCheckpoint:
        """Opens a directory or hub id; reads headers only.

        Args:
            trust_remote_code: whether code that lies beside the checkpoint may run.

        Raises:
            BesaError: it is not packed, in another version of the format, or not whole.
        """
        directory = resolve(model)
        config = read_config(directory, trust_remote_code)
        if getattr(config, "quantization_config", None) is None:
            raise BesaError(f"{directory} is not packed: it is a plain checkpoint already")
        try:
            packed_config = PackedConfig.from_dict(dict(config.quantization_config))
        except BesaError as error:
            raise BesaError(f"{directory}: {error}") from None
        del config.quantization_config
        files = weight_files(directory)
        parts = {name: weight for name in files if (weight := _packed_weight(name))}
        # In the plain checkpoint one tensor stands where the parts are.
        plain = {parts.get(name, name): path for name, path in files.items()}
        declared = getattr(config.get_text_config(), "dtype", None)
        dtype = declared if isinstance(declared, torch.dtype) else stored_dtype(files)
        skeleton = Checkpoint.of(directory, config, plain, trust_remote_code)
        weights = frozenset(parts.values())
        return cls(directory, packed_config, files, weights, skeleton, dtype)

    def check_digests(self) -> None:
        """Raises a BesaError if a file is not, to the last bit, what `besa export` wrote."""
        record = read_record(self.directory)
        for name, digest in record.digests.items() if record is not None else ():
            path = self.directory / name
            if path.is_file() and sha256(path) != digest:
                raise BesaError(
                    f"{path} is damaged: it is not what besa.json says that `besa export` wrote; "
                    "copy or export the model again"
                )

    def read(self, name: str) -> Tensor | None:
        """A stored tensor, or None.

        Raises:
            BesaError: its file cannot be read.
        """
        path = self.files.get(name)
        return None if path is None else read_tensor(path, name, "export the model again")

    def dense(self, name: str) -> Tensor:
        """A tensor of the plain checkpoint, unpacked if need be.

        Raises:
            FormatError: a packed weight is damaged, or has another shape than config.json says.
        """
        if name not in self.weights:
            tensor = self.read(name)
            assert tensor is not None
            return tensor
        shape, transposed = self.layout(name)
        packed = packed_of(self.read, name, shape[1], self.config)
        if packed.shape != shape:
            raise FormatError(f"{name} is {list(packed.shape)}, but config.json says {list(shape)}")
        weight = packed.unpack(self.dtype if packed.scale is not None else None)
        return weight.T.contiguous() if transposed else weight

    @property
    def dense_bytes(self) -> int:
        """What the plain checkpoint will take on the disk."""
        bytes_of = stored_bytes(self.files)
        size = sum(count for name, count in bytes_of.items() if _packed_weight(name) is None)
        dtype = self.dtype if self.config.has_scale else getattr(torch, self.config.values)
        shapes = (self.layout(weight)[0] for weight in self.weights)
        return size + sum(rows * cols for rows, cols in shapes) * dtype.itemsize

    def layout(self, name: str) -> tuple[torch.Size, bool]:
        """The shape [out, in] of a packed weight, and whether its model stores [in, out]."""
        target = self.skeleton.targets[name]
        try:
            module = self.skeleton.model.get_submodule(target.rpartition(".")[0])
        except AttributeError:
            module = None
        if not isinstance(module, nn.Linear | Conv1D):
            kind = type(self.skeleton.model).__name__
            raise FormatError(f"{name} is packed, but no linear of a {kind}")
        transposed = isinstance(module, Conv1D)
        shape = module.weight.shape
        return (torch.Size(shape[::-1]) if transposed else shape), transposed


Source = PackedCheckpoint | BitmaskCheckpoint | QuantizedCheckpoint


def _open(model: str | Path, trust_remote_code: bool) -> Source:
    """What is packed, by besa or by compressed-tensors, or quantized."""
    directory = resolve(model)
    config = read_config(directory, trust_remote_code)
    found = stored_as(vars(config))
    if found.floats or found.method == "besa":
        return PackedCheckpoint.open(directory, trust_remote_code)
    if found.packed_zeros:
        return BitmaskCheckpoint.of(directory, config, trust_remote_code)
    method = dequantizing(found.method)
    if method is None:
        raise not_floats(directory, found)
    return QuantizedCheckpoint.of(directory, config, method, trust_remote_code)


def unpack_checkpoint(packed: str | Path, config: ExportConfig, tell: Tell) -> ExportResult:
    """Writes the plain checkpoint; see `besa.export.export`."""
    started = time.monotonic()
    out = Path(config.out)
    check_free(out, config.overwrite)
    source = _open(packed, config.trust_remote_code)
    skeleton = source.skeleton
    source.check_digests()
    settings = {
        "command": "export",
        "format": config.format,
        "model": str(packed),
        "model_fingerprint": skeleton.fingerprint(),
        "besa": __version__,
    }
    with Workspace.open(out, settings, config.overwrite, source.dense_bytes) as workspace:
        try:
            with workspace.interruptible():
                shards = _write_shards(source, workspace, tell)
        except FormatError as error:
            raise BesaError(f"{source.directory} is damaged: {error}") from None
        workspace.write_index(shards)
        skeleton.copy_companions(workspace.path)
        size = sum((workspace.path / shard["file"]).stat().st_size for shard in shards)
        record = UnpackedRecord(
            besa_version=__version__,
            model=str(packed),
            architecture=type(skeleton.model).__name__,
            loader=skeleton.loader,
            settings=settings,
            versions=versions(),
            seconds=round(time.monotonic() - started, 3),
            peak_memory_bytes=peak_memory(),
            digests={shard["file"]: shard["sha256"] for shard in shards},
            format=config.format,
            source=read_raw_record(source.directory),
            sizes=UnpackedSizes(packed_bytes=skeleton.nbytes, bytes=size),
            unpacked=len(source.weights),
        )
        write_record(record, workspace.path)
        workspace.publish()
    return ExportResult(out, record)


def _write_shards(source: Source, workspace: Workspace, tell: Tell) -> list[dict[str, Any]]:
    """The shards' records: first what belongs to no block, then each block."""
    skeleton = source.skeleton
    parts = [("others", skeleton.other_keys)]
    parts += [(f"block-{i:05d}", keys) for i, keys in enumerate(skeleton.block_keys)]
    shards = []
    for number, (name, keys) in enumerate(parts):
        finished = workspace.finished(name)
        if finished is None:
            what = f"{skeleton.blocks_name}.{number - 1}" if number else "embedding and head"
            tell(Event("unpacking", what=what, done=number + 1, total=len(parts)))
            tensors = {key: source.dense(key) for key in keys}
            shard = workspace.shard(number + 1, len(parts))
            finished = workspace.finish(name, shard, tensors, {})
            del tensors
        shards.append(finished)
        give_memory_back()
    return shards


def _packed_weight(name: str) -> str | None:
    """The packed weight that a stored tensor is a part of, or None."""
    for suffix in SUFFIXES:
        if name.endswith(f".weight{suffix}"):
            return name.removesuffix(suffix)
    return None
