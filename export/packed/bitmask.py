"""Float weights whose zeros compressed-tensors packed: `sparse-bitmask`, `sparse-24-bitmask`.

Where a weight was, a file has its nonzeros row by row (`.compressed`), a bit for each of its
numbers with the lowest bit first (`.bitmask`, [out, ceil(in / 8)]), and its `.shape`.
llm-compressor wrote such checkpoints. Today's compressed-tensors calls them legacy and does not
read them, so besa does.

>>> values, bits = torch.tensor([1.0, 2.0]), torch.tensor([[0b0001], [0b1000]], dtype=torch.uint8)
>>> expanded(values, bits, (2, 4))
tensor([[1., 0., 0., 0.],
        [0., 0., 0., 2.]])
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from besa.formats import FormatError
from besa.model.checkpoint import Checkpoint
from besa.model.completeness import check_complete
from besa.model.files import read_tensor, stored_bytes, weight_files
from besa.model.quantization import drop_notes

_PARTS = (".compressed", ".bitmask", ".shape", ".row_offsets")


def expanded(values: Tensor, bitmask: Tensor, shape: tuple[int, int]) -> Tensor:
    """The weight [out, in] of its nonzeros.

    Raises:
        FormatError: the parts do not fit each other.
    """
    rows, cols = shape
    if bitmask.dtype != torch.uint8 or tuple(bitmask.shape) != (rows, -(-cols // 8)):
        raise FormatError(f"a bitmask is {list(bitmask.shape)}, of a weight of {rows} by {cols}")
    bits = (bitmask.unsqueeze(-1) >> torch.arange(8)) & 1
    mask = bits.flatten(1)[:, :cols].bool()
    if int(mask.sum()) != values.numel():
        raise FormatError(f"{values.numel()} values are there of {int(mask.sum())} in a bitmask")
    weight = torch.zeros(rows, cols, dtype=values.dtype)
    weight[mask] = values.flatten()
    return weight


@dataclass(frozen=True)
class BitmaskCheckpoint:
    """A model on disk, as `PackedCheckpoint` is one of besa's own.

    Attributes:
        directory: where it is.
        files: the file of each stored tensor.
        weights: the names of the packed weights.
        skeleton: the model that they make, as if `weights` were stored dense.
    """

    directory: Path
    files: dict[str, Path]
    weights: frozenset[str]
    skeleton: Checkpoint

    @classmethod
    def of(cls, directory: Path, config: Any, trust_remote_code: bool) -> BitmaskCheckpoint:
        """The model in a directory, with this config; reads headers only.

        Raises:
            BesaError: it is not whole.
        """
        drop_notes(config)
        files = weight_files(directory)
        parts = {name: weight for name in files if (weight := _packed_weight(name, files))}
        plain = {parts.get(name, name): path for name, path in files.items()}
        skeleton = Checkpoint.of(directory, config, plain, trust_remote_code)
        # The shapes in the headers are those of the parts.
        check_complete(directory, skeleton.model, plain, skeleton.conversions, shapes=None)
        return cls(directory, files, frozenset(parts.values()), skeleton)

    def check_digests(self) -> None:
        """Nothing says what its files should be."""

    def dense(self, name: str) -> Tensor:
        """A tensor of the plain checkpoint.

        Raises:
            FormatError: a packed weight is damaged.
            BesaError: its file cannot be read.
        """
        if name not in self.weights:
            return self._read(name)
        values, bitmask, shape = (self._read(name + part) for part in _PARTS[:3])
        rows, cols = shape.tolist()
        try:
            return expanded(values, bitmask, (rows, cols))
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from None

    @property
    def dense_bytes(self) -> int:
        """What the plain checkpoint takes on the disk, about: at most half of a weight is left."""
        return 2 * sum(stored_bytes(self.files).values())

    def _read(self, name: str) -> Tensor:
        path = self.files.get(name)
        if path is None:
            raise FormatError(f"{name} is missing")
        return read_tensor(path, name, "download the model again")


def _packed_weight(name: str, files: dict[str, Path]) -> str | None:
    """The packed weight that a stored tensor is a part of, or None."""
    for part in _PARTS:
        weight = name.removesuffix(part)
        if weight != name and f"{weight}.bitmask" in files:
            return weight
    return None
