"""Unpacks a packed checkpoint, block by block: the plain Hugging Face directory that it was.

>>> config = ExportConfig(out="dense", format="dense")
>>> unpack_checkpoint("path/to/sparse", config, tell=lambda event: None).out
PosixPath('dense')

Names, shapes, layouts and floats come back as they were, bit for bit (-0.0 as +0.0). int8 and int4
values come back as value × scale, rounded once to the model's dtype.
"""

from __future__ import annotations

import time
from collections.abc import Collection
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
from besa.formats import FormatError, Packed, PackedConfig, packed_of
from besa.formats.checkpoint import parts_in
from besa.machine import give_memory_back, peak_memory
from besa.model.architecture import read_config
from besa.model.blocks import Linear, stacked
from besa.model.checkpoint import Checkpoint
from besa.model.completeness import check_complete
from besa.model.expert_parts import parts_of
from besa.model.export_record import UnpackedRecord, UnpackedSizes
from besa.model.files import (
    read_tensor,
    resolve,
    stored_bytes,
    stored_dtype,
    stored_shapes,
    weight_files,
    whole_numbers,
)
from besa.model.layout import Layout, layout_of
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
        weights: the packed weights, by name, and how the plain checkpoint holds each.
        skeleton: the model that they make, as if `weights` were stored dense.
        dtype: the model's own, which int8 values become.
    """

    directory: Path
    config: PackedConfig
    files: dict[str, Path]
    weights: dict[str, Layout]
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
        parts = parts_in(files)
        # In the plain checkpoint one tensor stands where the parts are.
        plain = {parts.get(name, name): path for name, path in files.items()}
        declared = getattr(config.get_text_config(), "dtype", None)
        dtype = declared if isinstance(declared, torch.dtype) else stored_dtype(files)
        skeleton = Checkpoint.of(directory, config, plain, trust_remote_code)
        layouts = _layouts(skeleton, frozenset(parts.values()))
        shapes = {name: each for name, each in stored_shapes(files).items() if name not in parts}
        whole = {name: kind for name, kind in whole_numbers(files).items() if name not in parts}
        check_complete(directory, skeleton.model, plain, skeleton.conversions, shapes, whole)
        return cls(directory, packed_config, files, layouts, skeleton, dtype)

    def check_digests(self) -> None:
        """Raises a BesaError if weights are not, to the last bit, what `besa export` wrote."""
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
        layout = self.weights.get(name)
        if layout is None:
            tensor = self.read(name)
            assert tensor is not None
            return tensor
        packed = self._packed(name)
        return layout.stored(packed.unpack(self.dtype if packed.scale is not None else None))

    def check(self) -> None:
        """Checks every packed weight: its parts, its bitmask against its values, its shape.

        Raises:
            FormatError: as `dense` does.
        """
        for name in self.weights:
            self._packed(name)

    def _packed(self, name: str) -> Packed:
        layout = self.weights[name]
        packed = packed_of(self.read, name, layout.cols, self.config)
        if len(packed.bitmask) != layout.rows:
            raise FormatError(
                f"{name} is {list(packed.shape)}, but config.json says {[layout.rows, layout.cols]}"
            )
        return packed

    @property
    def dense_bytes(self) -> int:
        """What the plain checkpoint will take on the disk."""
        parts, bytes_of = parts_in(self.files), stored_bytes(self.files)
        size = sum(count for name, count in bytes_of.items() if name not in parts)
        dtype = self.dtype if self.config.has_scale else getattr(torch, self.config.values)
        return size + sum(x.rows * x.cols for x in self.weights.values()) * dtype.itemsize


def _layouts(skeleton: Checkpoint, weights: Collection[str]) -> dict[str, Layout]:
    """How the plain checkpoint holds each packed weight.

    Raises:
        FormatError: it is no linear's, and no experts', of the model.
    """
    layouts: dict[str, Layout] = {}
    stacks: dict[str, Linear] = {}
    for name in weights:
        target = skeleton.targets[name]
        owner, _, own = target.rpartition(".")
        try:
            module = skeleton.model.get_submodule(owner)
            weight = module.get_parameter(own)
        except AttributeError:
            module, weight = None, None
        if isinstance(module, nn.Linear | Conv1D):
            layouts[name] = layout_of(module)
        elif module is not None and weight is not None and weight.ndim == 3:
            stacks[target] = stacked(module, own)
        else:
            kind = type(skeleton.model).__name__
            raise FormatError(f"{name} is packed, but no linear of a {kind}")
    for target, parts in parts_of(stacks, weights, skeleton.model, skeleton.conversions).items():
        if parts is None:
            raise FormatError(f"{target} lacks some of its experts, or has them in another form")
        layouts |= {part.key: part.layout for part in parts}
    return layouts


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
        record = write_record(record, workspace.path)
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
