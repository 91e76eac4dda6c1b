"""Products of 1 to 64 tokens, straight from the records: sparse_linear.cu."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_void_p
from dataclasses import dataclass

from besa.kernels.cuda import driver
from besa.kernels.cuda.call import TYPES, Call, Needed, Shape, quantization, quantized

MOST_TOKENS = 64

# Tokens that each block quantizes for itself, and how many bytes they may have.
_OWN_TOKENS, _OWN_X = 2, 32 * 1024
_MOST_SHARED = 227 * 1024  # of a thread block, on any GPU


class _Problem(ctypes.Structure):
    _fields_ = (
        *(
            (name, c_void_p)
            for name in ("records", "offsets", "x", "x_scale", "scale", "bias", "y")
        ),
        *((name, c_int) for name in ("rows", "cols", "tokens", "capacity", "groups", "group_log")),
    )


@dataclass(frozen=True)
class Multiply:
    """The kernel that multiplies from the records.

    Attributes:
        blocks: of 16 rows, for each thread block.
        warps: of a thread block.
        stages: steps of a warp whose bytes are under way or in use.
        resident: thread blocks that shall fit a multiprocessor.
        splits: thread blocks of a cluster, which share the columns; 1 before capability 9.0.
    """

    blocks: int
    warps: int
    stages: int
    resident: int
    splits: int = 1

    def __str__(self) -> str:
        split = f", columns in {self.splits}" if self.splits > 1 else ""
        return f"records, {self.blocks} x 16 rows, {self.warps} warps, {self.stages} stages{split}"

    def kernels(self, shape: Shape, tokens: int) -> list[Needed] | None:
        """What it launches; None if a block would need more memory than it shall."""
        if tokens > MOST_TOKENS:
            return None
        if self.shared(shape, tokens) > _MOST_SHARED:
            return None
        found = [Needed("sparse_linear.cu", self.name(shape, tokens))]
        if self.kind(shape, tokens) == "INT8_READY":
            found.append(quantization(shape.x))
        return found

    def name(self, shape: Shape, tokens: int) -> str:
        """The instance of the kernel."""
        kind, group, pieces = self.kind(shape, tokens), group_of(shape), pieces_of(shape)
        numbers = (group, self.blocks, _eights(tokens), self.warps, self.stages, pieces)
        split = "true" if self.splits > 1 else "false"
        arguments = ", ".join(map(str, (TYPES[shape.x], kind, *numbers, self.resident, split)))
        return f"multiply<{arguments}>"

    def kind(self, shape: Shape, tokens: int) -> str:
        """What it does with the values: a `Kind` of sparse_linear.cu."""
        if not shape.int8:
            return "TWO_FOUR" if shape.two_four else "VALUES"
        if not shape.int8_input:
            return "INT8_FLOAT"
        own = tokens <= _OWN_TOKENS and tokens * shape.cols <= _OWN_X
        return "INT8" if own else "INT8_READY"

    def shared(self, shape: Shape, tokens: int) -> int:
        """Bytes of shared memory of a block, as sparse_linear.cu lays it out."""
        rings = 80 + self.warps * self.stages * self.blocks * shape.capacity
        sums = self.warps * self.blocks * _eights(tokens) * 512
        bytes_ = max(rings, sums)
        if self.kind(shape, tokens) == "INT8":
            bytes_ += tokens * shape.cols + 4 * (8 * _eights(tokens) + tokens * self.warps)
        return bytes_

    def run(self, call: Call) -> None:
        """Queues the product."""
        shape, tokens, device = call.shape, call.tokens, call.x.device
        x, x_scale = call.x, None
        if self.kind(shape, tokens) == "INT8_READY":
            x, x_scale = quantized(call)
        problem = _Problem(
            call.records.data_ptr(),
            driver.at(call.offsets),
            x.data_ptr(),
            driver.at(x_scale),
            driver.at(call.scale),
            driver.at(call.bias),
            call.y.data_ptr(),
            shape.rows,
            shape.cols,
            tokens,
            shape.capacity,
            0 if call.scale is None else call.scale.shape[1],
            1 if shape.group_size == 128 else 0,
        )
        driver.kernel("sparse_linear.cu", self.name(shape, tokens), device).launch(
            (self.splits, -(-shape.rows // (16 * self.blocks)), 1),
            self.warps * 32,
            self.shared(shape, tokens),
            problem,
            call.stream,
            early=True,
            cluster=self.splits,
        )


def group_of(shape: Shape) -> int:
    """Columns that share a scale as the kernel knows them: 0, 32 or 64."""
    return min(shape.group_size, 64)  # groups of 128 are two tiles with the same scale


def pieces_of(shape: Shape) -> int:
    """Pieces of 512 bytes that a record has, at most, as the kernel knows them: 2, 3 or 5."""
    return next(n for n in (2, 3, 5) if shape.capacity <= 512 * n)


def _eights(tokens: int) -> int:
    """Groups of 8 tokens, rounded up to a power of two."""
    return next(n for n in (1, 2, 4, 8) if tokens <= 8 * n)
