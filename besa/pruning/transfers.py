"""Copies between host memory and a GPU that run beside the computation.

Each direction has a stream of its own, so that batches come in and go out while the GPU computes. A
copy is a transfer by DMA only from and to pinned (page-locked) host memory; from any other, CUDA
makes the host wait. `CudaCopies` takes pinned memory. `StagedCopies` takes any, a mapped file for
one, and goes through a few pinned buffers.

Why torch's pinned allocator and not cudaHostRegister on ordinary memory: it frees nothing that a
copy still uses, and an error of it is an exception. Registered memory has to be unregistered by
hand before it is freed, and a refusal stays behind as the error of the next kernel.

>>> copies_for(torch.device("cpu")) is None  # it computes on the host's tensors themselves
True
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# torch's pinned allocator rounds up to a power of two, so memory comes in pieces of one.
_CHUNK_BYTES = 1 << 29

# Buffers of a batch each: two reads ahead, a write, and one that is being filled.
_SLOTS = 4


class Done(Protocol):
    """The end of work that was queued."""

    def synchronize(self) -> None:
        """Makes the host wait for it."""


class Copies(Protocol):
    """Queues copies beside the computation.

    Attributes:
        pinned: whether the host memory has to be pinned for copies to run beside anything.
    """

    pinned: bool

    def read(self, host: Tensor, after: Any = None) -> tuple[Tensor, Done]:
        """Begins to copy to the device, once `after` is done."""

    def take(self, tensor: Tensor, arrived: Any) -> Tensor:
        """What was read, for the computation that is queued from now on."""

    def write(self, value: Tensor, host: Tensor) -> Done:
        """Begins to copy a result to the host, once it is computed."""

    def computed(self) -> Done:
        """The end of the computation that is queued so far."""


class CudaCopies:
    """Copies between a GPU and pinned memory, on a stream for each direction."""

    pinned = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.inward, self.outward = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def read(
        self, host: Tensor, after: torch.cuda.Event | None = None
    ) -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.stream(self.inward):
            if after is not None:
                self.inward.wait_event(after)
            tensor = host.to(self.device, non_blocking=True)
            return tensor, self.inward.record_event()

    def take(self, tensor: Tensor, arrived: torch.cuda.Event) -> Tensor:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(arrived)
        tensor.record_stream(current)  # its memory is the inward stream's, and used on this one
        return tensor

    def write(self, value: Tensor, host: Tensor) -> torch.cuda.Event:
        self.outward.wait_event(self.computed())
        with torch.cuda.stream(self.outward):
            host.copy_(value, non_blocking=True)
            value.record_stream(self.outward)  # lives until it is copied
            return self.outward.record_event()

    def computed(self) -> torch.cuda.Event:
        return torch.cuda.current_stream(self.device).record_event()


class StagedCopies:
    """The same from and to any host memory, through a few pinned buffers.

    The host copies between memory and buffer, on the calling thread: a read's part at once, a
    write's when its end is waited for or its buffer is needed.

    Args:
        copies: between the buffers and the device.
        buffers: of one dtype, each as large as the largest tensor.
    """

    pinned = False

    def __init__(self, copies: Copies, buffers: Sequence[Tensor]) -> None:
        self.copies = copies
        self.buffers = list(buffers)
        self.users: list[Done | None] = [None] * len(self.buffers)
        self.next = 0

    def read(self, host: Tensor, after: Done | None = None) -> tuple[Tensor, Done]:
        if after is not None:
            after.synchronize()
        slot, buffer = self._buffer(host)
        buffer.copy_(host)
        tensor, arrived = self.copies.read(buffer)
        self.users[slot] = arrived
        return tensor, arrived

    def take(self, tensor: Tensor, arrived: Done) -> Tensor:
        return self.copies.take(tensor, arrived)

    def write(self, value: Tensor, host: Tensor) -> Done:
        slot, buffer = self._buffer(host)
        written = _Staged(self.copies.write(value, buffer), buffer, host)
        self.users[slot] = written
        return written

    def computed(self) -> Done:
        return self.copies.computed()

    def _buffer(self, like: Tensor) -> tuple[int, Tensor]:
        """The next buffer in turn, once nobody uses it, in the shape of a tensor."""
        slot = self.next
        self.next = (slot + 1) % len(self.buffers)
        user = self.users[slot]
        if user is not None:
            user.synchronize()
        return slot, self.buffers[slot][: like.numel()].view(like.shape)


@dataclass
class _Staged:
    """A write that is over when it is in the buffer and from there in its place."""

    in_buffer: Done
    buffer: Tensor
    host: Tensor
    over: bool = False

    def synchronize(self) -> None:
        if not self.over:
            self.in_buffer.synchronize()
            self.host.copy_(self.buffer)
            self.over = True


def copies_for(device: torch.device) -> Copies | None:
    """Copies that run beside a GPU's computation; None for a device that has no CUDA streams."""
    return CudaCopies(device) if device.type == "cuda" else None


def pinned(shapes: Sequence[torch.Size], dtype: torch.dtype) -> list[Tensor] | None:
    """Uninitialized tensors in pinned memory, in a few large pieces; None where it is refused."""
    chunks: list[Tensor] = []
    try:
        for sizes in _pieces([math.prod(shape) for shape in shapes], dtype.itemsize):
            chunk = torch.empty(sum(sizes), dtype=dtype, pin_memory=True)
            chunks += chunk.split(sizes)
    except RuntimeError:  # the system's limit on locked memory, for one
        chunks.clear()
        # What had been pinned goes back to the system, which is short of it, not to torch's cache.
        empty_cache = getattr(torch._C, "_host_emptyCache", None)
        if empty_cache is not None:  # a build with CUDA
            empty_cache()
        return None
    return [part.view(shape) for part, shape in zip(chunks, shapes, strict=True)]


def _pieces(sizes: Sequence[int], itemsize: int) -> list[list[int]]:
    """Sizes in elements, in order, cut into runs of at most `_CHUNK_BYTES` where they allow it."""
    pieces: list[list[int]] = []
    room = 0
    for size in sizes:
        if size > room or not pieces:
            pieces.append([])
            room = _CHUNK_BYTES // itemsize
        pieces[-1].append(size)
        room -= size
    return pieces


def staged(copies: Copies, largest: int, dtype: torch.dtype) -> Copies:
    """Copies from and to any memory, for tensors of at most `largest` elements."""
    buffers = pinned([torch.Size([largest])] * _SLOTS, dtype)
    # Without any pinned memory, CUDA stages by itself, and the host waits.
    return copies if buffers is None else StagedCopies(copies, buffers)
