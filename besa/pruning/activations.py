"""The calibration stream between blocks: a list of tensors, in memory or in a mapped file.

>>> hidden = [torch.ones(1, 4, 8), torch.ones(1, 4, 8)]
>>> stream = Activations.of(hidden, torch.float32, directory=None, name="stream")
>>> stream[0] = 2 * stream[0]
>>> stream[0].mean(), stream[1].mean()
(tensor(2.), tensor(1.))
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from besa.writing import writing


class Activations(Sequence[Tensor]):
    """Host tensors [batch, tokens, width], one per batch; setting one copies into its place.

    With a directory they live in a file there, mapped into memory, so that the system can write
    them out when memory is short.
    """

    def __init__(
        self, shapes: Sequence[torch.Size], dtype: torch.dtype, directory: Path | None, name: str
    ) -> None:
        self.directory = directory
        self.path = directory / f"{name}.activations" if directory else None
        if self.path is None:
            self.tensors = [torch.empty(shape, dtype=dtype) for shape in shapes]
            return
        sizes = [math.prod(shape) for shape in shapes]
        with writing(self.path), self.path.open("wb") as file:
            # All of it now: on a full disk, writing to mapped memory ends the process.
            os.posix_fallocate(file.fileno(), 0, sum(sizes) * dtype.itemsize)
        flat = torch.from_file(str(self.path), shared=True, size=sum(sizes), dtype=dtype)
        parts = flat.split(sizes)
        self.tensors = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    @classmethod
    def of(
        cls, tensors: Sequence[Tensor], dtype: torch.dtype, directory: Path | None, name: str
    ) -> Activations:
        """A copy of `tensors` in `dtype`."""
        new = cls([t.shape for t in tensors], dtype, directory, name)
        for i, tensor in enumerate(tensors):
            new[i] = tensor
        return new

    @classmethod
    def like(cls, other: Activations, count: int, name: str) -> Activations:
        """Room for `count` tensors shaped like the first ones of `other`, in the same place."""
        first = other.tensors[:count]
        return cls([t.shape for t in first], first[0].dtype, other.directory, name)

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        return self.tensors[index]

    def __setitem__(self, index: int, value: Tensor) -> None:
        self.tensors[index].copy_(value)

    def close(self) -> None:
        """Frees the memory, and removes the file if there is one."""
        self.tensors = []
        if self.path is not None:
            self.path.unlink(missing_ok=True)
