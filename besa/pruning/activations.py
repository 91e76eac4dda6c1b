"""The calibration stream between blocks: a list of tensors, in memory or in a mapped file.

>>> hidden = [torch.ones(1, 4, 8), torch.ones(1, 4, 8)]
>>> stream = Activations.of(hidden, torch.float32, directory=None, name="stream")
>>> stream[0] = 2 * stream[0]
>>> stream[0].mean(), stream[1].mean()
(tensor(2.), tensor(1.))

On the CPU an element is the host's tensor itself. For a GPU it is a copy there. Whoever reads says
in which order (`expect`), and batches are copied ahead of their use; what is set is copied back
while the GPU goes on. Neither costs time while a batch takes longer to compute than to copy.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from besa.errors import BesaWarning
from besa.processes.launch import launch_of
from besa.pruning.transfers import Copies, Done, pinned, staged
from besa.writing import writing

# Batches that are copied to the device before they are asked for.
_AHEAD = 2

# Batches that the host may be ahead of the device: each has tensors there that are in use.
_UNDER_WAY = 4


class Activations(Sequence[Tensor]):
    """Host tensors [batch, tokens, width], one per batch; setting one copies into its place.

    With a directory they live in a file there, mapped into memory, so that the system can write
    them out when memory is short.

    Args:
        copies: to and from the device that computes; None: it reads the host's tensors itself.
    """

    def __init__(
        self,
        shapes: Sequence[torch.Size],
        dtype: torch.dtype,
        directory: Path | None,
        name: str,
        copies: Copies | None = None,
    ) -> None:
        self.directory = directory
        own = f"-{rank}" if (rank := launch_of().rank) else ""  # processes may share the directory
        self.path = directory / f"{name}{own}.activations" if directory else None
        self.tensors, self.copies = _host_memory(shapes, dtype, self.path, copies)
        self._expected: deque[int] = deque()
        self._arriving: dict[int, tuple[Tensor, Done]] = {}
        self._leaving: dict[int, Done] = {}
        self._computed: deque[Done] = deque()

    @classmethod
    def of(
        cls,
        tensors: Sequence[Tensor],
        dtype: torch.dtype,
        directory: Path | None,
        name: str,
        copies: Copies | None = None,
    ) -> Activations:
        """A copy of `tensors` in `dtype`."""
        new = cls([t.shape for t in tensors], dtype, directory, name, copies)
        for i, tensor in enumerate(tensors):
            new.tensors[i].copy_(tensor)
        return new

    @classmethod
    def like(cls, other: Activations, count: int, name: str) -> Activations:
        """Room for `count` tensors shaped like the first ones of `other`, in the same place."""
        first = other.tensors[:count]
        shapes = [t.shape for t in first]
        return cls(shapes, first[0].dtype, other.directory, name, other.copies)

    def __len__(self) -> int:
        return len(self.tensors)

    def expect(self, order: Iterable[int]) -> None:
        """Says which batches are read next, in this order. To read others is slower, not wrong."""
        if self.copies is not None:
            self._expected = deque(order)
            self._arriving = {i: x for i, x in self._arriving.items() if i in self._expected}
            self._read_ahead(self.copies)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        copies = self.copies
        if copies is None:
            return self.tensors[index]
        index = range(len(self))[index]
        # A host that runs ahead would fill the device with batches.
        self._computed.append(copies.computed())
        if len(self._computed) > _UNDER_WAY:
            self._computed.popleft().synchronize()
        if index not in self._arriving:
            self._read(index, copies)
        tensor, arrived = self._arriving.pop(index)
        if self._expected and self._expected[0] == index:
            self._expected.popleft()
        self._read_ahead(copies)
        return copies.take(tensor, arrived)

    def _read_ahead(self, copies: Copies) -> None:
        for i in islice(self._expected, _AHEAD):
            if i not in self._arriving:
                self._read(i, copies)

    def _read(self, index: int, copies: Copies) -> None:
        after = self._leaving.get(index)
        self._arriving[index] = copies.read(self.tensors[index], after)

    def __setitem__(self, index: int, value: Tensor) -> None:
        copies = self.copies
        if copies is None:
            self.tensors[index].copy_(value)
            return
        index = range(len(self))[index]
        self._arriving.pop(index, None)  # what was read ahead is out of date
        earlier = self._leaving.pop(index, None)
        if earlier is not None:
            earlier.synchronize()
        self._leaving[index] = copies.write(value, self.tensors[index])
        while len(self._leaving) > _UNDER_WAY:
            self._leaving.pop(next(iter(self._leaving))).synchronize()

    def settle(self) -> None:
        """Waits until all that was set is in host memory."""
        while self._leaving:
            self._leaving.pop(next(iter(self._leaving))).synchronize()

    def close(self) -> None:
        """Frees the memory, and removes the file if there is one."""
        self.settle()  # an error of a copy is said here, if nowhere before
        self._expected.clear()
        self._arriving.clear()
        self._computed.clear()
        self.tensors = []
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _host_memory(
    shapes: Sequence[torch.Size], dtype: torch.dtype, path: Path | None, copies: Copies | None
) -> tuple[list[Tensor], Copies | None]:
    """Tensors in memory or in a new file at `path`, and the copies that suit such memory."""
    pin = copies is not None and copies.pinned
    if path is None and pin and (tensors := pinned(shapes, dtype)) is not None:
        return tensors, copies
    sizes = [math.prod(shape) for shape in shapes]
    if path is not None:
        tensors = _mapped(shapes, dtype, path)
    else:
        tensors = [torch.empty(shape, dtype=dtype) for shape in shapes]
        if pin:
            warnings.warn(
                f"the system does not pin {sum(sizes) * dtype.itemsize / 1e9:.1f} GB of memory: "
                "activations are copied to the GPU in two steps, which is slower",
                BesaWarning,
                stacklevel=4,
            )
    if pin:
        assert copies is not None
        copies = staged(copies, max(sizes), dtype)
    return tensors, copies


def _mapped(shapes: Sequence[torch.Size], dtype: torch.dtype, path: Path) -> list[Tensor]:
    """Tensors in a new file, mapped into memory."""
    sizes = [math.prod(shape) for shape in shapes]
    with writing(path), path.open("wb") as file:
        # All of it now: on a full disk, writing to mapped memory ends the process.
        os.posix_fallocate(file.fileno(), 0, sum(sizes) * dtype.itemsize)
    flat = torch.from_file(str(path), shared=True, size=sum(sizes), dtype=dtype)
    return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
